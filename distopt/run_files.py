"""What lies in the directory of a run: its facts, the rows of its metrics, its checkpoints.

Training writes these files, and commands that ask no process of the run read them, such as `distopt status`. Both sides
find here what the files are called and how a damaged one is read. It imports the standard library alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distopt.launchers import METRICS_FILE, RUN_FILE

MANIFEST = "manifest.json"
"""The file of a checkpoint that is written last: a folder without it is no checkpoint."""

# Steps are padded so that names sort like numbers up to 99,999,999; beyond that they only get longer.
_CHECKPOINT = re.compile(r"step-(\d{8,19})(-[0-9a-f]{8,32})?")


def step_of(folder: str) -> int | None:
    """Returns the step that a checkpoint's folder is named after, None for another name.

    Example:
        >>> step_of("step-00000123"), step_of(".tmp-00000123-5f0c1a2b")
        (123, None)
    """
    match = _CHECKPOINT.fullmatch(folder)
    return int(match[1]) if match else None


def checkpoints_in(directory: Path) -> list[Path]:
    """Returns the checkpoints of a directory that were committed, by step; none where there is no such directory."""
    manifests = directory.glob(f"step-*/{MANIFEST}")
    return sorted((path.parent for path in manifests if step_of(path.parent.name) is not None), key=_step_and_name)


def _step_and_name(folder: Path) -> tuple[int, str]:
    return step_of(folder.name) or 0, folder.name


def read_facts(run_dir: Path) -> dict[str, Any]:
    """Returns what `run.json` says; empty for a run that has none, as those of older versions."""
    try:
        facts = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def read_metrics(run_dir: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a run's `metrics.jsonl`, oldest first, without lines that are damaged.

    Args:
        run_dir: The directory of the run.
        last_bytes: Reads no more than these bytes at the end of the file; None reads all.
    """
    path = run_dir / METRICS_FILE
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, path.stat().st_size - last_bytes))
            data = file.read()
    except OSError:
        return []
    return [row for line in data.splitlines() if (row := parse_row(line)) is not None]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Returns a row of metrics; None for a line that a process was killed over, or a disk has damaged."""
    try:
        row = json.loads(line)
    except ValueError:  # also of bytes that are no UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None

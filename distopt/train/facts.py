"""`run.json`: what is known of a run besides its metrics: when it began, with what, and which rank waited for which."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyro
import torch
from pydantic_core import to_json

import distopt
from distopt.backends import Backend
from distopt.config import RunConfig
from distopt.launchers import RUN_FILE
from distopt.run_files import read_facts
from distopt.train.loggers import report_unwritable
from distopt.train.monitor import RankPace, describe_straggler


class Facts:
    """Writes `run.json` in the run directory, on rank 0; on other ranks nothing is written.

    Args:
        config: The run.
        backend: Tells the workers.
        first_step: Step that the run resumes from. A new run has new facts; one that resumes keeps its beginning.
    """

    def __init__(self, config: RunConfig, backend: Backend, first_step: int) -> None:
        self._has_failed = False
        self._path = config.run_dir / RUN_FILE if backend.rank == 0 else None
        if self._path is None:
            return

        now = datetime.now(UTC).isoformat(timespec="seconds")
        before = read_facts(config.run_dir) if first_step else {}
        self._facts: dict[str, Any] = {
            "name": config.name,
            "task": config.task or config.script,
            "seed": config.seed,
            "num_steps": config.train.num_steps,
            "num_workers": backend.world_size,
            "backend": backend.name,
            "began_at": before.get("began_at", now),
            "started_at": now,
            "num_starts": before.get("num_starts", 0) + 1,
            "first_step": first_step,
            "outcome": None,
            "versions": _versions(),
            "commit": _commit(),
            "paces": [],
        }
        self._write()

    def note(self, **facts: Any) -> None:
        """Adds facts, or replaces them."""
        if self._path is not None:
            self._facts |= facts
            self._write()

    def note_paces(self, paces: Sequence[RankPace]) -> None:
        """Replaces the paces of the ranks, and the sentence on a straggler among them."""
        self.note(paces=[asdict(pace) for pace in paces], straggler=describe_straggler(paces))

    def _write(self) -> None:
        assert self._path is not None
        # Replaced as a whole: who reads while the run goes on sees the old facts or the new ones.
        written = self._path.with_suffix(".tmp")
        try:
            # Python's own indented JSON leaves cycles behind, a few dozen objects for each checkpoint.
            written.write_bytes(to_json(self._facts, indent=1) + b"\n")
            os.replace(written, self._path)
        except OSError as error:  # the disk is full, perhaps, and the next call finds room
            if not self._has_failed:
                report_unwritable(self._path, error)
            self._has_failed = True
        else:
            self._has_failed = False


def paces_of(facts: dict[str, Any]) -> list[RankPace]:
    """Returns the paces of the ranks that facts have."""
    return [RankPace(**pace) for pace in facts.get("paces", [])]


def _versions() -> dict[str, str]:
    return {
        "distopt": distopt.__version__,
        "pyro": pyro.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """Returns the commit of the current directory, with `-dirty` if files differ from it; None without git."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

"""The rounds of an elastic Horovod world, in a file of the run directory that the driver writes and guards read.

In each round the driver gives every worker its place. A round is over when a lost host is back: workers save and end,
and their guards ask for new places. A guard that sees a later round than its own was left behind on a lost host.
"""

from __future__ import annotations

import os
from pathlib import Path

FILE = "round"


def begin(run_dir: Path, number: int) -> None:
    """Writes down a new round."""
    _write(run_dir, f"{number}\n")


def end(run_dir: Path, number: int) -> None:
    """Writes down that a round is over."""
    _write(run_dir, f"{number} over\n")


def read(run_dir: Path) -> tuple[int, bool]:
    """Returns the number of the last round, 0 before the first one, and whether it is over."""
    try:
        words = (run_dir / FILE).read_text().split()
    except OSError:
        return 0, False
    return int(words[0]), len(words) > 1


def _write(run_dir: Path, text: str) -> None:
    """Puts the whole file in place at once."""
    new = run_dir / f".{FILE}.{os.getpid()}"
    new.write_text(text)
    new.replace(run_dir / FILE)

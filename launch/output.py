"""What ranks print, shown as it comes: one rank's as it is, that of several line by line with their numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .jobs import Job
from .worker.rank_log import HEADER, read_log

Read = Callable[[int, int], bytes]


class Output:
    """Prints what is new since it last looked.

    Args:
        ranks: Whose output.
        read: Returns what a rank has printed after its first so many bytes.
        seen: Bytes of each rank that are not shown.
        headers: Whether the lines that begin an attempt are shown too.
    """

    def __init__(
        self, ranks: Sequence[int], read: Read, seen: Sequence[int] | None = None, *, headers: bool = False
    ) -> None:
        self._read = read
        self._headers = headers
        self._shown = dict(zip(ranks, seen or [0] * len(ranks), strict=True))

    def show(self) -> None:
        """Prints it; of several ranks, whole lines alone."""
        several = len(self._shown) > 1
        for rank, shown in self._shown.items():
            data = self._read(rank, shown)
            if several:
                data = data[: data.rfind(b"\n") + 1]
            self._shown[rank] += len(data)
            for line in data.splitlines(keepends=True):
                if self._headers or not HEADER.match(line):
                    sys.stdout.write((f"[{rank}] " if several else "") + line.decode("utf-8", "replace"))
        sys.stdout.flush()


def of_job(job: Job) -> Read:
    """Reads what an engine has kept."""
    return lambda rank, offset: job.logs(rank).encode()[offset:]


def of_files(run_dir: Path) -> Read:
    """Reads the logs in a run directory."""
    return lambda rank, offset: read_log(run_dir, rank, offset)

"""What ranks print, shown as it comes: one rank's output as it is, that of several line by line with their numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .jobs import Job
from .worker.rank_log import HEADER, read_log

Read = Callable[[int, int], bytes]
"""Returns what a rank has printed, from a byte on: `read(rank, offset)`."""


# Logs are read again and again rather than waited for: they lie on file systems that notify nobody (NFS), or behind the
# API of a cluster. How far each rank has been shown is counted in bytes, and what a rank has printed only grows.


class Output:
    """Prints what ranks have printed since the last call.

    Args:
        ranks: Whose output.
        read: Returns what a rank has printed.
        offsets: Bytes of each rank that are not shown; none when None.
        headers: Whether the lines that begin an attempt are shown too.
    """

    def __init__(
        self, ranks: Sequence[int], read: Read, offsets: Sequence[int] | None = None, *, headers: bool = False
    ) -> None:
        self._read = read
        self._headers = headers
        self._offsets = dict(zip(ranks, offsets or [0] * len(ranks), strict=True))

    def show(self) -> None:
        """Prints what is new. Of several ranks only whole lines, so that no line mixes the output of two."""
        has_several = len(self._offsets) > 1

        for rank, offset in self._offsets.items():
            data = self._read(rank, offset)
            if has_several:
                data = data[: data.rfind(b"\n") + 1]
            self._offsets[rank] += len(data)

            for line in data.splitlines(keepends=True):
                if self._headers or not HEADER.match(line):
                    sys.stdout.write((f"[{rank}] " if has_several else "") + line.decode("utf-8", "replace"))
        sys.stdout.flush()


def of_job(job: Job) -> Read:
    """Returns a reader of the logs that the job's platform has."""
    return lambda rank, offset: job.logs(rank).encode()[offset:]


def of_files(run_dir: Path) -> Read:
    """Returns a reader of the logs in a run directory."""
    return lambda rank, offset: read_log(run_dir, rank, offset)

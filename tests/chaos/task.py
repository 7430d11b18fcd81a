"""The task of a disturbed run: it writes down which rows each life reads, and makes reads of checkpoints fail."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distopt.launchers import find_rank
from tests.train.tasks import Line

FAULTS = "read-errors"
"""A file in the run's folder: while it is there, reads of checkpoints fail now and then, or always."""
INJECTED = "injected.txt"
ERRORS = (errno.EIO, errno.ESTALE, errno.EMFILE)


class Recorded(Line):
    """The straight line, a little slower, with a file for each life of each rank.

    Args:
        folder: Where each process writes `life-RANK-PID.jsonl`: first the checkpoints that were there when it began,
            then a digest of the rows of each batch, the one that makes the parameters first.
        pace_s: Seconds that a batch takes.
    """

    def __init__(self, folder: str, pace_s: float = 0.0) -> None:
        super().__init__()
        rank_info = find_rank()
        rank = rank_info.rank if rank_info is not None else 0
        self._pace_s = pace_s
        self._life = Path(folder) / f"life-{rank}-{os.getpid()}.jsonl"
        published = sorted(path.name for path in (Path(folder) / "run" / "checkpoints").glob("step-*"))
        self._append({"published": published, "began": time.time()})
        make_reads_fail(Path(folder))

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        self._append(hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()[:16])
        time.sleep(self._pace_s)
        return super().batch(rows)

    def _append(self, line: Any) -> None:
        with self._life.open("a") as file:
            file.write(json.dumps(line) + "\n")


def make_reads_fail(folder: Path) -> None:
    """Has opening, listing and reading below `checkpoints` raise OSError while the file `FAULTS` is there.

    The file holds the share of calls that fail. Each failure is written down, for a test to see.
    """
    chance = random.Random(os.getpid())

    def fail(path: str) -> None:
        if "/checkpoints" not in path:
            return
        try:
            share = float((folder / FAULTS).read_text() or 0)
        except FileNotFoundError:
            return
        if chance.random() < share:
            number = chance.choice(ERRORS)
            with (folder / INJECTED).open("a") as file:
                file.write(f"{os.getpid()} {errno.errorcode[number]} {path}\n")
            raise OSError(number, os.strerror(number), path)

    def path_of(target: Any, dir_fd: int | None = None) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        above = os.readlink(f"/proc/self/fd/{dir_fd}") + "/" if dir_fd is not None else ""
        return above + os.path.abspath(os.fspath(target)) if not above else above + os.fspath(target)

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *args: Any, **kwargs: Any) -> Any:
            fail(path_of(target, kwargs.get("dir_fd")))
            return call(target, *args, **kwargs)

        return wrapped

    real_open = os.open

    def open_or_fail(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        # Writers are left alone: what they must survive is a full disk, which is a real one.
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            fail(path_of(path, kwargs.get("dir_fd")))
        return real_open(path, flags, *args, **kwargs)

    os.open = open_or_fail
    for name in ("preadv", "pread", "listdir"):
        setattr(os, name, failing(getattr(os, name)))

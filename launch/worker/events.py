"""What happened to workers: one line of JSON per start and end, in `run_dir/logs/rank-N.jsonl`."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distopt import cgroups
from distopt.launchers import LOGS
from distopt.worker_error import WorkerError, parse_error


@dataclass(frozen=True)
class Event:
    """Something that happened to a worker.

    Attributes:
        rank: The worker's rank.
        attempt: How often the workers had been started before.
        host: The worker's host.
        pid: Of the worker's supervisor.
        time: Seconds since the epoch, on the worker's host.
        status: The exit status of a worker that has ended, negative for a signal.
        stopped: Whether the worker had been asked to stop.
        out_of_memory: Whether it was killed because its control group ran out of memory.
        raised: The error that it has recorded, as JSON values of a `WorkerError`; None where it has recorded none.
    """

    rank: int
    attempt: int
    host: str
    pid: int
    time: float
    status: int | None = None
    stopped: bool = False
    out_of_memory: bool = False
    raised: dict[str, Any] | None = None


class Start(Event):
    """A worker has been started."""


@dataclass(frozen=True)
class Unwritable(Event):
    """A file of the run directory cannot be written, as when the disk is full; the worker runs on.

    Attributes:
        path: The file.
        error: Why.
    """

    path: str = ""
    error: str = ""


class Preemption(Event):
    """A file has announced that the worker's host will be taken away; the worker has been asked to stop."""


class End(Event):
    """A worker has ended."""

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and not successfully."""
        return self.status != 0 and not self.stopped

    @property
    def worker_error(self) -> WorkerError | None:
        """The error that the worker has recorded."""
        return None if self.raised is None else parse_error(self.raised)


STOPPED_STATUSES = (0, 128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT)
"""How a worker ends that was asked to stop, and did: with a status of its own choice, or by the signal."""

_KINDS: dict[str, type[Event]] = {"start": Start, "end": End, "unwritable": Unwritable, "preemption": Preemption}


def error_file(run_dir: Path, rank: int, pid: int) -> Path:
    """Returns where a worker records its error, by the process of its supervisor, which takes it into its event."""
    return run_dir / LOGS / f".error-{rank}-{pid}.json"


def append(run_dir: Path, event: Event) -> None:
    """Adds one line to the file of the event's rank; each file has one writer at a time.

    Raises:
        OSError: The line could not be written; the file is as before.
    """
    line = json.dumps({"event": type(event).__name__.lower(), **asdict(event)}).encode() + b"\n"
    with (run_dir / LOGS / f"rank-{event.rank}.jsonl").open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            line = b"\n" + line  # a writer was killed within a line
        if isinstance(event, Start):
            _reserve(file.fileno(), size)
        if file.write(line) != len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


RESERVED_BYTES = 4096
_FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h


def _reserve(fd: int, size: int) -> None:
    """Reserves room behind the end of a file, so that how a worker ends can be recorded though the disk is full then.

    Readers do not see it. File systems that cannot do it, such as NFS 3, do without.
    """
    if sys.platform == "linux":
        bounds = ctypes.c_int64(size), ctypes.c_int64(RESERVED_BYTES)
        ctypes.CDLL(None).fallocate(fd, _FALLOC_FL_KEEP_SIZE, *bounds)


class Reader:
    """Reads what is appended to the files of all ranks.

    The files of a run are appended to by each of its attempts, and by every later run in the same directory. So a
    reader keeps for each file how many bytes it has read, and usually starts where the file ends now.

    Args:
        run_dir: The run directory.
        from_start: Whether events that are there already are read too.

    Attributes:
        seen: All events that `new` has returned.
    """

    def __init__(self, run_dir: Path, *, from_start: bool = False) -> None:
        self._logs = run_dir / LOGS
        existing = [] if from_start else self._logs.glob("rank-*.jsonl")
        self._offsets = {path: path.stat().st_size for path in existing}
        self.seen: list[Event] = []

    def new(self) -> list[Event]:
        """Returns the events since the last call, in the order of time."""
        events = [event for path in sorted(self._logs.glob("rank-*.jsonl")) for event in self._read(path)]
        events.sort(key=lambda event: event.time)
        self.seen += events
        return events

    def _read(self, path: Path) -> Iterator[Event]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written; the next call reads it
                self._offsets[path] = self._offsets.get(path, 0) + len(line)
                event = _parse(line)
                if event is not None:
                    yield event


def _parse(line: bytes) -> Event | None:
    """Returns the event of a line; None for one that a writer was killed over, or that another version has written."""
    try:
        fields = json.loads(line)
        return _KINDS[fields.pop("event")](**fields)
    except (ValueError, LookupError, AttributeError, TypeError):
        return None


def oom_kills() -> int:
    """Returns how often the kernel has killed for want of memory in this process's control group (v1 or v2).

    A worker that is killed so sees nothing of it, and neither does its parent: the status is that of any SIGKILL. The
    group's counter, before and after, is what tells the two apart.
    """
    count = 0
    for group, _ in cgroups.groups("memory"):
        for name in ("memory.events", "memory.oom_control"):
            try:
                text = (group / name).read_text()
            except OSError:
                continue
            count += sum(int(number) for number in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))
    return count

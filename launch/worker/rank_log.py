"""The log of one rank, `run_dir/logs/rank-N.log`: all that it printed, each attempt below a line of dashes."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Self

from distopt.launchers import LOGS, USAGE_ERROR
from distopt.worker_error import MAX_TEXT, WorkerError, message_may_pass

# The line above each attempt. It is matched as a whole, since a worker's output may have lines of dashes as well.
HEADER = re.compile(rb"^--- \d{4}-\d\d-\d\dT\S+ rank \d+ of \d+, attempt \d+")

MAX_TRACEBACK_LINES = 30

# torch reports a connection that another rank has closed with a trace of its C++ code. A rank that has already said why
# it ends prints such a trace behind its reason, from the thread of its heartbeat, and the reason is what is wanted.
_LIBRARY_TRACE = re.compile(
    r"\[?[WEIF]\d{4} |\[rank\d+\]:\[[WEIF]\d{4} |frame #\d+: |<omitting python frames>|Exception raised from "
)

_FRAME = re.compile(r'\s+File "(?P<file>[^"]+)", line (?P<line>\d+)')
_NEVER_HEALS = re.compile(r"(ModuleNotFoundError|ImportError|SyntaxError|IndentationError|TabError)(: |$)")

# What Python, argparse and click print above or beside an argument that they refuse. Another script may end with status
# 2 for reasons of its own, after hours, or because a rank is gone.
_REFUSED = re.compile(r"[Uu]sage: \S|.*: can't open file '")
_USAGE_LINES = 40  # of an attempt's end, in which those stand

_WARNING = re.compile(r":\d+: \w*Warning: ")  # as Python prints it: file, line, category


def log_of(run_dir: Path, rank: int) -> Path:
    """Returns where a rank's output is kept."""
    return run_dir / LOGS / f"rank-{rank}.log"


class RankLog:
    """A rank's log, written as far as it can be: a full disk, or a file of another user, ends no worker.

    Args:
        run_dir: The run directory.
        rank: The rank.
        report: Called with the path and the error when writing begins to fail.
    """

    def __init__(self, run_dir: Path, rank: int, report: Callable[[Path, OSError], None]) -> None:
        self._path = log_of(run_dir, rank)
        self._report = report
        self._file: IO[bytes] | None = None
        self._error: OSError | None = None  # the last one, until writing succeeds again
        self._lost_bytes = 0

    def __enter__(self) -> Self:
        """Opens the file."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            self._lose(b"", error)
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def write(self, data: bytes) -> None:
        """Appends data; what cannot be written is left out, and its length noted in its place once something can be."""
        if self._file is None:
            return
        gap = f"\n--- {self._lost_bytes} bytes are missing here: {self._error}\n".encode() if self._error else b""
        try:
            rest = memoryview(gap + data)
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError as error:
            self._lose(rest[-len(data) :] if data else b"", error)
            return
        self._error = None
        self._lost_bytes = 0

    def _lose(self, data: bytes | memoryview, error: OSError) -> None:
        self._lost_bytes += len(data)
        is_new = self._error is None
        self._error = error
        if is_new:
            self._report(self._path, error)


def read_log(run_dir: Path, rank: int, offset: int = 0) -> bytes:
    """Returns a rank's output from a byte on; nothing where it has not started."""
    return read_from(log_of(run_dir, rank), offset)


def read_from(path: Path, offset: int) -> bytes:
    """Returns what a file holds from a byte on; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except OSError:
        return b""


def header(rank: int, world_size: int, attempt: int) -> bytes:
    """Returns the line that begins an attempt, with the time of day."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    return f"--- {now} rank {rank} of {world_size}, attempt {attempt}\n".encode()


def last_lines(path: Path, count: int = 20) -> list[str]:
    """Returns the last lines of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            # A rank that prints in a loop can fill gigabytes; 2,000 lines of output are seldom longer than this.
            file.seek(max(0, path.stat().st_size - 256 * 1024))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except OSError:
        return []


def last_attempt_lines(run_dir: Path, rank: int) -> list[str]:
    """Returns what a rank printed in its last attempt, of long output the end."""
    lines = last_lines(log_of(run_dir, rank), 2000)
    header_index = max((index for index, line in enumerate(lines) if HEADER.match(line.encode())), default=-1)
    return lines[header_index + 1 :]


def traceback_of(run_dir: Path, rank: int) -> list[str]:
    """Returns the last traceback that a rank printed in its last attempt; its last messages if it printed none."""
    lines = last_attempt_lines(run_dir, rank)
    messages = _without_warnings(lines)
    starts = [index for index, line in enumerate(messages) if "Traceback (most recent call last)" in line]
    if starts:
        return messages[starts[-1] :][-MAX_TRACEBACK_LINES:]
    return messages[-10:] if any(map(str.strip, messages)) else lines[-10:]


def last_line(run_dir: Path, rank: int) -> str:
    """Returns the last line of a rank's traceback, which in Python names the exception; empty where it printed none.

    A line of a library's C++ code, or a warning, is no reason.
    """
    messages = _without_warnings(traceback_of(run_dir, rank))
    return next((line for line in reversed(messages) if line.strip()), "")


def final_error(run_dir: Path, rank: int, status: int) -> WorkerError | None:
    """Returns the error of a worker that has recorded none, if what it printed tells that it would come again.

    Python that cannot compile or import a script ends with status 1 before the script's first line, and a script that
    refuses its arguments with status 2 and a line of usage.

    Args:
        run_dir: The run directory.
        rank: The worker's rank.
        status: Its exit status.
    """
    line = last_line(run_dir, rank).strip()
    lines = traceback_of(run_dir, rank)
    frames = [match for each in lines if (match := _FRAME.match(each))]
    is_code = status == 1 and bool(frames) and bool(_NEVER_HEALS.match(line)) and not message_may_pass(line)
    is_refusal = status == USAGE_ERROR and not frames and not message_may_pass(line) and _shows_usage(run_dir, rank)
    if not (is_code or is_refusal):
        return None
    location = f"{frames[-1]['file']}:{frames[-1]['line']}" if is_code else ""
    return WorkerError(line[:MAX_TEXT] or f"exit status {status}", location, time.time(), permanent=True)


def _shows_usage(run_dir: Path, rank: int) -> bool:
    return any(map(_REFUSED.match, last_attempt_lines(run_dir, rank)[-_USAGE_LINES:]))


def _without_warnings(lines: list[str]) -> list[str]:
    """Returns the lines without those of C++ traces, and without warnings and the line of code that follows each."""
    kept: list[str] = []
    in_warning = False
    for line in lines:
        is_code = in_warning and line.startswith("  ")
        in_warning = bool(_WARNING.search(line))
        if not (in_warning or is_code or _LIBRARY_TRACE.match(line.lstrip())):
            kept.append(line)
    return kept

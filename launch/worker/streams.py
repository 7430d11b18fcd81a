"""Standard streams that may go away: a terminal that is closed, a reader that ends, a disk that is full."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

# What `distopt launch` prints is for whoever looks; the run does not depend on it. A terminal that was closed answers
# each write with EIO, and an error raised here would end the launcher before the last checkpoint. Python's own streams
# keep what they could not write, try it again when the process ends, and change its exit status to 120.


class BestEffort(io.RawIOBase):
    """Writes as much to a file descriptor as that takes, and leaves out the rest.

    Attributes:
        error: The number of the last error; None while everything is written.
    """

    def __init__(self, fd: int) -> None:
        self.error: int | None = None
        self._fd = fd

    def fileno(self) -> int:
        """Returns the file descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Returns whether it is a terminal."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, data: bytes | memoryview, /) -> int:  # type: ignore[override]
        """Writes what can be written; returns as if all was."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            self.error = None
        except OSError as error:
            self.error = error.errno
        return len(data)


@contextmanager
def best_effort() -> Iterator[None]:
    """Has what is printed within the block left out where it cannot be written."""
    before = sys.stdout, sys.stderr
    for stream in before:
        with suppress(OSError):
            stream.flush()
    sys.stdout, sys.stderr = map(_wrap, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def has_lost_its_reader(stream: TextIO) -> bool:
    """Returns whether nobody reads the pipe behind a stream of `best_effort` any more."""
    raw: Any = stream.buffer if isinstance(stream, io.TextIOWrapper) else None
    return isinstance(raw, BestEffort) and raw.error == errno.EPIPE


def read_secrets() -> dict[str, str]:
    """Returns the variables that stand in the first line of standard input, as JSON; none at its end.

    Values travel this way to other hosts, through ssh: a command line can be read by every user of a machine, and a
    file may outlive the run.
    """
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):  # what follows the line is another's to read
        line += byte
    return {str(name): str(value) for name, value in json.loads(line or b"{}").items()}


def open_standard_streams() -> None:
    """Opens those of the three standard streams that this process was started without, as `>&-` does.

    The next file that is opened would get their number, and what is printed would be written into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            os.set_inheritable(fd, True)
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def _wrap(stream: TextIO) -> TextIO:
    try:
        fd = stream.fileno()
    except (OSError, ValueError):
        return stream  # another program's object, such as that of a test
    # Any text can be written: a folder's name may hold letters that the terminal's encoding lacks.
    raw: Any = BestEffort(fd)
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", write_through=True)

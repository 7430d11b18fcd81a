"""The terminal of `distopt launch`, lent to rank 0 so that its progress bar works; its log gets plain lines."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import socket
import sys
import termios
from typing import IO

from distopt.launchers import TERMINAL_VARIABLE

from .rank_log import RankLog
from .streams import BestEffort

# Control sequences as ECMA-48 has them: CSI (colours, cursor), OSC (titles), and those of one character.
_ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def lend() -> dict[str, str]:
    """Returns the variable that tells rank 0's supervisor where this process's terminal is; empty without one."""
    try:
        return {TERMINAL_VARIABLE: f"{socket.gethostname()}:{os.ttyname(sys.stdout.fileno())}"}
    except (OSError, ValueError):
        return {}


def open_for(rank: int) -> IO[bytes] | None:
    """Returns the terminal that was lent, for rank 0 on the terminal's own machine."""
    host, _, device = os.environ.get(TERMINAL_VARIABLE, "").partition(":")
    if rank != 0 or not device or host != socket.gethostname():
        return None
    try:
        screen = os.fdopen(os.open(device, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC), "wb", buffering=0)
    except OSError:
        return None
    if screen.isatty():
        return screen
    screen.close()
    return None


def open_pseudo_terminal(screen: IO[bytes]) -> tuple[int, int]:
    """Opens a pseudo-terminal of the screen's size, which changes no byte on the way.

    Returns:
        The file descriptors of the end that is read here and of the worker's end.
    """
    reading_end, worker_end = pty.openpty()
    modes = termios.tcgetattr(worker_end)
    modes[1] &= ~termios.OPOST  # the real terminal turns line feeds into new lines
    termios.tcsetattr(worker_end, termios.TCSANOW, modes)
    copy_size(screen, worker_end)
    return reading_end, worker_end


def copy_size(screen: IO[bytes], terminal: int) -> None:
    """Gives a terminal as many rows and columns as `screen` has."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, fcntl.ioctl(screen, termios.TIOCGWINSZ, b"\0" * 8))


class Tee:
    """Copies a worker's output to its log, and to the terminal where there is one.

    A progress bar redraws its line many times a second; of each line the log gets the last state, without colours.

    Args:
        log: The rank's log.
        screen: The terminal; None where the worker has none.
        echo: Whether this process prints the output too, where the platform keeps it, as Kubernetes does.
    """

    def __init__(self, log: RankLog, screen: IO[bytes] | None, *, echo: bool = False) -> None:
        self._log = log
        self._screen = screen
        self._stdout = BestEffort(sys.stdout.fileno())
        self._echo = echo
        self._line = b""

    def copy(self, source: int) -> bool:
        """Copies what can be read now; false at the end of the output."""
        try:
            data = os.read(source, 65536)
        except OSError:  # EIO: the other end of the pseudo-terminal has been closed
            data = b""
        if not data:
            return False

        if self._echo:
            self._stdout.write(data)
        if self._screen is None:
            self._log.write(data)
            return True

        try:
            copy_size(self._screen, source)
            self._screen.write(data)
        except OSError:
            pass  # the terminal has been closed; the run continues
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._log.write(plain(line) + b"\n")
        return True

    def close(self) -> None:
        """Writes the last, unfinished line."""
        if plain(self._line):
            self._log.write(plain(self._line) + b"\n")


def plain(line: bytes) -> bytes:
    r"""Returns the last state of a line on a terminal, without escape sequences.

    Example:
        >>> plain(b"step 1\r\x1b[2K\x1b[32mstep 2\x1b[0m\r")
        b'step 2'
    """
    states = [state for state in _ESCAPE.sub(b"", line).split(b"\r") if state.strip()]
    return states[-1] if states else b""

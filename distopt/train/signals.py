"""Ctrl-C, SIGTERM and what else asks a program to stop: a rank finishes its step first."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)

# A terminal that goes away, and what batch systems send before their limits. Programs use these for other things, too,
# such as a dump of all stacks, so they are taken only where nobody else has.
_ALSO_STOPPING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

# One Ctrl-C can arrive twice, from the terminal and from the launcher that passes it on. Only a signal that comes later
# than this is a second request, which ends the process at once.
_ECHO_S = 1.0


class StopSignals:
    """Notes a signal to stop between `hold` and the end of the block; a second signal ends the process.

    Before `hold` the first signal ends it: there is nothing to save yet, and a handler written in Python would only be
    called when the library that waits for the other ranks returns. Python allows signal handlers only in the main
    thread, so it must be entered there. A signal that was ignored before the block, as Ctrl-C is in what a script
    starts in the background, stays ignored. Of the signals but Ctrl-C and SIGTERM, one that has a handler keeps it.

    Args:
        until_exit: Whether the process ends after the block. Signals to stop that come later are then ignored: the
            process does what they ask for, and one that dies before it has left MPI would have mpirun kill the others.

    Attributes:
        received: The number of the first signal; 0 if none was received.

    Example:
        >>> with StopSignals() as stop:
        ...     stop.hold()
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     stop.received
        15
    """

    def __init__(self, *, until_exit: bool = False) -> None:
        self.received = 0
        self._until_exit = until_exit
        self._first_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Restores the default handlers, under which a signal ends the process."""
        heeded = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        heeded += [number for number in _ALSO_STOPPING if _has_no_handler(number)]
        self._before = {number: signal.signal(number, signal.SIG_DFL) for number in heeded}
        return self

    def hold(self) -> None:
        """Starts noting signals."""
        for number in self._before:
            signal.signal(number, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the handlers from before the block, or ignores signals until the process ends."""
        for number, handler in self._before.items():
            # Not a handler in Python: the interpreter takes those away before it calls what MPI and others leave with.
            signal.signal(number, signal.SIG_IGN if self._until_exit else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.received:
            self.received = number
            self._first_s = now_s
        elif now_s - self._first_s > _ECHO_S:
            os._exit(128 + number)


def _has_no_handler(number: signal.Signals) -> bool:
    """Returns whether a signal has its default effect; Python does not know of handlers in C, as of `faulthandler`."""
    if signal.getsignal(number) != signal.SIG_DFL:
        return False
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return True
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return not caught >> (number - 1) & 1

"""SIGTERM and Ctrl-C: asked to stop, a rank finishes its step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)

# Terminal and launcher may both pass one Ctrl-C on; a signal later than this is a second wish.
_ECHO_S = 1.0


class StopSignals:
    """Notes a signal to stop from `hold` to the block's end, instead of dying from it; a second one ends the process.

    Before `hold` the first one does: there is nothing to save, and a handler of Python's would not be called before the
    library that waits for the other ranks returns. Must be entered in the main thread, as Python asks of all signal
    handlers.
    """

    def __init__(self) -> None:
        self.received = 0
        """The number of the signal that came, or 0."""
        self._first_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Takes over the signals."""
        self._before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
        return self

    def hold(self) -> None:
        """Lets signals be noted from here on."""
        for number in STOPPING:
            signal.signal(number, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.received:
            self.received, self._first_s = number, now_s
        elif now_s - self._first_s > _ECHO_S:
            os._exit(128 + number)

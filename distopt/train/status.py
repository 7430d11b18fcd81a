"""What a run knows about itself while it goes on, for whoever asks from outside."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field


@dataclass
class Status:
    """Numbers that the loop writes and the server reads; each is one assignment, so no lock is needed.

    None stands for what has not been measured yet. Times are of `time.monotonic()`.
    """

    step: int = 0
    """The step last finished, counted from the start of the run."""
    steps_done: int = 0
    """Steps finished by this process."""
    skipped_steps: int = 0
    """Steps of this process in which the optimizer changed nothing, since a gradient was not finite."""
    rows_per_s: float | None = None
    """Rows of the data read per second, over all ranks."""
    loss: float | None = None
    """Mean over the ranks of the last measured step's loss, in nats."""
    gradient_norm: float | None = None
    """2-norm of the averaged gradient of the last measured step."""
    all_reduce_s: float = 0.0
    """Seconds that this process has spent waiting for sums over the ranks."""
    all_reduce_bytes: int = 0
    """Bytes that this process has given into sums over the ranks."""
    checkpoint_s: float | None = None
    """Seconds that the last checkpoint kept the loop from going on."""
    checkpoint_at: float | None = None
    """When the state of the last checkpoint that was committed was copied, or one was restored."""
    restarts: int = field(default_factory=lambda: _restarts())
    """Times that the engine has started the workers again."""
    joined: bool = False
    """Whether this rank has met the others and has its state."""
    progress_at: float = field(default_factory=time.monotonic)
    """When the last step, or another piece of work as long as that, was finished."""

    def progress(self) -> None:
        """Notes that a piece of work is done that takes long and is no step: joining, restoring, the report."""
        self.progress_at = time.monotonic()

    def finish_step(self, step: int) -> None:
        """Notes that a step is done."""
        self.step = step
        self.steps_done += 1
        self.progress()

    def stalled_s(self) -> float:
        """Returns the seconds since the last progress."""
        return time.monotonic() - self.progress_at

    def checkpoint_age_s(self) -> float | None:
        """Returns the seconds since the last checkpoint, None when there was none."""
        return None if self.checkpoint_at is None else time.monotonic() - self.checkpoint_at


def _restarts() -> int:
    """Reads what torchrun tells its workers; other engines tell nothing."""
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() else 0

"""What a run knows about itself while it goes on, for whoever asks from outside."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import monotonic

from distopt.backends import Backend


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


# How long each rank takes for its own part of a step, and so who is waited for.


STRAGGLER_RATIO = 1.5
"""A rank is a straggler when its own part of a step takes this many times as long as the median of the others."""

WARM_UP_STEPS = 2
"""The first steps of a process are not measured: they agree on parameters and make the optimizer's state."""


@dataclass(frozen=True)
class RankPace:
    """What one rank's steps take on the mean, in seconds: its own work, and its waiting for the others' gradients."""

    rank: int
    host: str
    own_s: float
    waiting_s: float


class Pace:
    """Measures the steps of this rank.

    A step's time less what it waits in all-reduces is the rank's own part: rows, model, backward, the optimizer.
    On a GPU the wait would hold the rank's own kernels too, which are still under way when it begins; so there are no
    paces where parameters live on one.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._num_steps, self._own_s, self._waiting_s = -WARM_UP_STEPS, 0.0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures a step."""
        began, waited = monotonic(), self._backend.all_reduce_s
        yield
        self._num_steps += 1
        if self._num_steps > 0:
            waiting_s = self._backend.all_reduce_s - waited
            self._waiting_s += waiting_s
            self._own_s += monotonic() - began - waiting_s

    def gather(self) -> list[RankPace]:
        """Returns the paces of all ranks so far; none for a lone rank, on a GPU, or before there was a step.

        Cost: one `all_gather_json`; a collective call.
        """
        if self._backend.world_size == 1 or self._backend.device.type != "cpu":
            return []
        own = [socket.gethostname(), self._num_steps, self._own_s, self._waiting_s]
        told = list(enumerate(self._backend.all_gather_json(own)))
        return [RankPace(rank, host, own / num, waiting / num) for rank, (host, num, own, waiting) in told if num > 0]


def describe_straggler(paces: Sequence[RankPace]) -> str | None:
    """Says which rank keeps the others waiting, and how much; None when none does."""
    if len(paces) < 2:
        return None
    slowest = max(paces, key=lambda pace: pace.own_s)
    others = [pace for pace in paces if pace is not slowest]
    usual_s = median(pace.own_s for pace in others)
    if slowest.own_s < STRAGGLER_RATIO * usual_s:
        return None
    own, usual, ratio = 1e3 * slowest.own_s, 1e3 * usual_s, slowest.own_s / usual_s
    return (
        f"rank {slowest.rank} on {slowest.host} is a straggler: its own part of a step takes {own:.3g} ms, "
        f"{ratio:.1f} times the median of the others ({usual:.3g} ms)"
    )

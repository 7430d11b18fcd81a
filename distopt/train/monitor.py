"""What a run knows about itself while it is in progress: its state for `serve`, and how long each rank's steps take."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from time import monotonic

from distopt.backends import Backend
from distopt.launchers import count_restarts
from distopt.train.loggers import Logger

STRAGGLER_RATIO = 1.5
"""A rank is a straggler when its work for a step takes this many times as long as the median of the other ranks."""

STRAGGLER_S = 1e-3
"""Seconds for which a straggler keeps the others waiting in a step, at least: less is the noise of a busy machine."""

MEASURED_STEPS = 20
"""Steps before a rank can be a straggler: in a run of five, one page fault is a fifth of the mean."""

WARM_UP_STEPS = 2
"""Steps of a process that are not measured, because they agree on parameters and create the optimizer's state."""


@dataclass
class Status(Logger):
    """Numbers that the loop writes and the server reads; each is one assignment, so no lock is needed.

    None means that nothing was measured yet. Times are those of `time.monotonic()`. Unlike other loggers it is there on
    every rank, because every rank is served.
    """

    step: int = 0
    """The last finished step, counted from the start of the run."""
    steps_done: int = 0
    """Steps finished by this process."""
    resumed_from: int | None = None
    """The step that this process began from; None before a checkpoint was looked for."""
    skipped_steps: int = 0
    """Steps of this process in which the optimizer changed nothing because a gradient was not finite."""
    rows_per_s: float | None = None
    """Rows of the data read per second, over all ranks."""
    loss: float | None = None
    """Loss in nats, mean over the ranks and over the steps between two logged ones."""
    gradient_norm: float | None = None
    """2-norm of the averaged gradient of the last logged step."""
    all_reduce_s: float = 0.0
    """Seconds that this process has spent waiting for all-reduces."""
    all_reduce_bytes: int = 0
    """Bytes that this process has passed to all-reduces."""
    checkpoint_s: float | None = None
    """Seconds for which the last checkpoint blocked the loop."""
    checkpoint_at: float | None = None
    """When the state of the last committed checkpoint was copied, or when a checkpoint was restored."""
    restarts: int = field(default_factory=lambda: count_restarts())
    """How often the launcher has restarted the workers."""
    joined: bool = False
    """Whether this rank has met the others and has its state."""
    progress_at: float = field(default_factory=time.monotonic)
    """When the last step, or another piece of work that takes as long, was finished."""

    # The server's thread reads while the loop writes. Each attribute is replaced as a whole, so a reader sees an old or
    # a new value, and never half of one; two attributes may come from different steps, which no probe minds.

    def progress(self) -> None:
        """Notes the end of a long piece of work that is no step: joining, restoring, writing the report."""
        self.progress_at = time.monotonic()

    def after_step(self, step: int) -> None:
        """Notes that a step is done."""
        self.step = step
        self.steps_done += 1
        self.progress()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keeps the values for the server."""
        # A script may log less, and what it does not log stays None.
        elbo = values.get("elbo")
        self.loss = None if elbo is None else -elbo
        self.rows_per_s = values.get("rows_per_s")
        self.gradient_norm = values.get("gradient_norm")

    def stalled_s(self) -> float:
        """Returns the seconds since the last progress."""
        return time.monotonic() - self.progress_at

    def checkpoint_age_s(self) -> float | None:
        """Returns the seconds since the last checkpoint; None if there was none."""
        return None if self.checkpoint_at is None else time.monotonic() - self.checkpoint_at


@dataclass(frozen=True)
class RankPace:
    """How long the steps of a rank take on average.

    Args:
        rank: The rank.
        host: The name of its host.
        work_s: Seconds of a step that the rank works: rows, model, backward, optimizer.
        waiting_s: Seconds of a step that it waits for the gradients of the other ranks.
        num_steps: Over how many steps these are means.
    """

    rank: int
    host: str
    work_s: float
    waiting_s: float
    num_steps: int


class PaceMeter:
    """Measures the steps of this rank.

    The time of a step without the waiting in all-reduces is the rank's work. On a GPU the waiting would include the
    rank's own kernels, which are still running when it begins; so paces are not measured when the backend's device is
    one.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._num_steps = -WARM_UP_STEPS
        self._work_s = 0.0
        self._waiting_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures a step."""
        # The backend adds up the waiting, wherever in the step it happens: in the optimizer, or during backward with
        # `reduce.overlap`.
        began_s = monotonic()
        waited_s = self._backend.all_reduce_s
        yield

        self._num_steps += 1
        if self._num_steps > 0:
            waiting_s = self._backend.all_reduce_s - waited_s
            self._waiting_s += waiting_s
            self._work_s += monotonic() - began_s - waiting_s

    def all_ranks(self) -> list[RankPace]:
        """Returns the paces of all ranks so far; none for a single rank, on a GPU, or before the first measured step.

        Cost:
            One `all_gather_json`; all ranks must call it.
        """
        if self._backend.world_size == 1 or self._backend.device.type != "cpu":
            return []

        totals = [socket.gethostname(), self._num_steps, self._work_s, self._waiting_s]
        return [
            RankPace(rank, host, work_s / num_steps, waiting_s / num_steps, num_steps)
            for rank, (host, num_steps, work_s, waiting_s) in enumerate(self._backend.all_gather_json(totals))
            if num_steps > 0
        ]


def describe_straggler(paces: Sequence[RankPace]) -> str | None:
    """Returns a sentence about the rank that keeps the others waiting; None if no rank does."""
    if len(paces) < 2 or min(pace.num_steps for pace in paces) < MEASURED_STEPS:
        return None

    # Compared with the median of the others and not with the mean: a second slow rank would hide the first.
    slowest = max(paces, key=lambda pace: pace.work_s)
    usual_s = median(pace.work_s for pace in paces if pace is not slowest)
    if slowest.work_s < max(STRAGGLER_RATIO * usual_s, usual_s + STRAGGLER_S):
        return None
    return (
        f"rank {slowest.rank} on {slowest.host} is a straggler: its work for a step takes "
        f"{1e3 * slowest.work_s:.3g} ms, {slowest.work_s / usual_s:.1f} times the median of the other ranks "
        f"({1e3 * usual_s:.3g} ms)"
    )

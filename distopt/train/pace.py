"""How long each rank takes for its own part of a step, and so who is waited for."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import monotonic

from distopt.backends import Backend

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

"""What ends a loop before its last step: a signal, or a body that leaves it by `break`; all ranks agree on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distopt.backends import Backend
from distopt.optim import DistributedOptimizer


class LoopEnd:
    """Notes why the loop of a run ends, and tells it to the other ranks.

    Ranks do not receive a signal in the same step, and the body may leave the loop on one rank alone. A rank that went
    on by itself would wait for ever in its next reduction, so after each step all of them add up what each has seen.

    Args:
        backend: Link to the other ranks.
        saved: What the run saves; its optimizers tell whether a step was taken.

    Attributes:
        is_stopped: Whether the run was asked to stop.
        is_left: Whether the body of the loop was left, on some rank.
        is_in_step: Whether a step was begun and not ended: outside of the loop it is one whose body was left.

    Cost:
        `agree` is one all-reduce of two numbers where there are other ranks, unless the step has agreed already.
    """

    def __init__(self, backend: Backend, saved: Iterable[Any]) -> None:
        self.is_stopped = False
        self.is_left = False
        self.is_in_step = False
        self._backend = backend
        self._optimizers = [each for each in saved if isinstance(each, DistributedOptimizer)]
        self._num_reductions = 0
        self._agreed: bool | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Marks a step of the loop."""
        self._agreed = None
        self._num_reductions = self._count_reductions()
        self.is_in_step = True
        yield  # not in try-finally: `break` closes the generator of the loop, which then stays in its step
        self.is_in_step = False

    def leave(self) -> bool:
        """Notes that the body was left; returns whether its step counts.

        It does if the optimizer has stepped since it began. Without a `DistributedOptimizer` nobody knows, and most
        bodies look at the result of a step before they leave.
        """
        self.is_in_step = False
        self.is_left = True
        return not self._optimizers or self._count_reductions() != self._num_reductions

    def note_stop(self, stop: bool) -> None:
        """Says that all ranks have agreed already in this step whether to stop."""
        self._agreed = stop

    def agree(self, asked: bool) -> None:
        """Agrees after a step whether to go on; all ranks call it.

        Args:
            asked: Whether this rank was asked to stop.
        """
        if self._agreed is not None:
            self.is_stopped = self._agreed
            return
        flags = torch.tensor([asked, self.is_left], dtype=torch.float32, device=self._backend.control_device)
        if self._backend.world_size > 1:
            self._backend.all_reduce(flags).wait()
        self.is_stopped, self.is_left = (number > 0 for number in flags.tolist())

    def _count_reductions(self) -> int:
        return sum(each.reducer.step for each in self._optimizers)

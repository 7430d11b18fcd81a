"""What ends a loop before its last step: a signal, or a body that leaves it by `break`; all ranks agree on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distopt.backends import Backend
from distopt.optim import DistributedOptimizer
from distopt.reduce.errors import DisagreementError


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
        `agree` is one all-reduce of two numbers where there are other ranks, unless the step has agreed already, and
        `leave` before a step is one without gradients.
    """

    def __init__(self, backend: Backend, saved: Iterable[Any]) -> None:
        self.is_stopped = False
        self.is_left = False
        self.is_in_step = False
        self._backend = backend
        self._saved = saved  # looked through in each step: `everywhere` may adopt an optimizer after this
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
        """Notes that the body was left for good; returns whether its step counts, as `go_on` does.

        Raises:
            DisagreementError: This rank has left before its step, as one does whose data end first, and another rank
                takes that step. All ranks raise one, for the other would wait in its reduction until a timeout.
        """
        self.is_left = True
        if self.go_on():
            return True
        optimizers = self._optimizers()
        if self._backend.world_size > 1 and len(optimizers) == 1:  # of several it is not known which is called first
            try:
                optimizers[0].synchronize()
            except DisagreementError as error:
                raise DisagreementError(
                    f"rank {self._backend.rank} has left the loop before a step that another rank takes. Leave it by "
                    "`break` after the step, which one rank may do for all, or give all ranks as many steps: data that "
                    "end earlier on one rank do this, too."
                ) from error
        return False

    def go_on(self) -> bool:
        """Ends a step whose body was left; returns whether it counts.

        It does if the optimizer has stepped since it began. Without a `DistributedOptimizer` nobody knows, and most
        bodies look at the result of a step before they leave.
        """
        was_in_step = self.is_in_step
        self.is_in_step = False
        return was_in_step and (not self._optimizers() or self._count_reductions() != self._num_reductions)

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

    def _optimizers(self) -> list[DistributedOptimizer]:
        return [each for each in self._saved if isinstance(each, DistributedOptimizer)]

    def _count_reductions(self) -> int:
        return sum(each.reducer.step for each in self._optimizers())

"""Buckets that are sent while backward still runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distopt.reduce.layout import Bucket, Layout


class Overlap:
    """Starts a bucket as soon as the last of its gradients is complete.

    Buckets start from the last to the first on all ranks, since backward reaches first what the model used last, and
    the names of a network's layers mostly follow its order. The bucket with the control slots is left to the
    optimizer's call. A bucket that is not complete on some rank (a parameter was not touched) starts in the call as
    well, and so do those behind it: ranks may differ in when they start a bucket, but never in which comes next.

    How often `backward` reaches a parameter before a call (once for each particle, say) is seen in the step before, so
    the first step with these buckets has no overlap.

    Args:
        layout: The buckets and parameters.
        start: Fills and starts a bucket.
    """

    def __init__(self, layout: Layout, start: Callable[[Bucket], None]) -> None:
        self._start = start
        self._order = layout.buckets[:0:-1]
        self._position_of = {index: position for position, bucket in enumerate(self._order) for index in bucket.indices}
        self._counts = dict.fromkeys(self._position_of, 0)
        self._expected = dict(self._counts)  # counts of the last step in which the parameter was touched
        self.reset()
        self._hooks = [_register(layout.params[index], partial(self._count, index)) for index in self._position_of]

    def reset(self) -> None:
        """Prepares for the next step."""
        self._expected.update({index: count for index, count in self._counts.items() if count})
        self._counts = dict.fromkeys(self._position_of, 0)
        self._num_missing = [len(bucket.indices) for bucket in self._order]
        self.num_started = 0

    def close(self) -> None:
        """Removes the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    @property
    def waiting(self) -> list[Bucket]:
        """The buckets that have not started, in their order."""
        return self._order[self.num_started :]

    @torch.no_grad()
    def _count(self, index: int, param: Tensor) -> None:
        """Counts a gradient that backward has accumulated; starts the buckets that are complete by it."""
        position = self._position_of[index]
        if position < self.num_started:
            raise RuntimeError(
                f"overlap=True: a gradient of shape {tuple(param.shape)} was added to when it was being sent already, "
                f"after {self._counts[index]} backward passes as in the step before. Run backward() equally often "
                "before each call, or use overlap=False."
            )
        self._counts[index] += 1
        if self._counts[index] == self._expected[index]:
            self._num_missing[position] -= 1
        while self.waiting and self._num_missing[self.num_started] == 0:
            self._start(self.waiting[0])
            self.num_started += 1


def _register(param: Any, hook: Callable[[Tensor], None]) -> Any:
    return param.register_post_accumulate_grad_hook(hook)

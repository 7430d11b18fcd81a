"""Buckets that start to cross while backward still runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distopt.reduce.layout import Bucket, Layout


class Overlap:
    """Starts a bucket as soon as the last of its gradients is there.

    Buckets start from the last to the first on all ranks, since backward reaches first what the model used last, and
    the names of a network's layers mostly follow its order. The bucket with the control slots is left to the
    optimizer's call. A bucket that does not fill on some rank (a parameter was not touched) starts in the call as
    well, and so do those behind it: the order is what ranks have in common.

    Args:
        layout: The buckets and parameters.
        backward_passes: Times that `backward` reaches each parameter before a call.
        start: Fills and starts a bucket.
    """

    def __init__(self, layout: Layout, backward_passes: int, start: Callable[[Bucket], None]) -> None:
        self._passes, self._start = backward_passes, start
        self._order = layout.buckets[:0:-1]
        self._bucket_of = {index: bucket for bucket in self._order for index in bucket.indices}
        self.reset()
        self._hooks = [_register(layout.params[index], partial(self._arrived, index)) for index in self._bucket_of]

    def reset(self) -> None:
        """Prepares for the next step."""
        self._counts = dict.fromkeys(self._bucket_of, 0)
        self._missing = {id(bucket): len(bucket.indices) for bucket in self._order}
        self.num_started = 0

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @property
    def waiting(self) -> list[Bucket]:
        """The buckets that have not started, in their order."""
        return self._order[self.num_started :]

    @torch.no_grad()
    def _arrived(self, index: int, param: Tensor) -> None:
        bucket = self._bucket_of[index]
        self._counts[index] += 1
        if self._counts[index] > self._passes:
            raise RuntimeError(
                f"overlap=True: a gradient of shape {tuple(param.shape)} grew again after {self._passes} backward "
                "passes, when it was on its way already. Give the optimizer backward_passes=, the number of times that "
                "backward() runs before each call (num_particles), or overlap=False."
            )
        if self._counts[index] == self._passes:
            self._missing[id(bucket)] -= 1
        while self.waiting and self._missing[id(self.waiting[0])] == 0:
            self._start(self.waiting[0])
            self.num_started += 1


def _register(param: Any, hook: Callable[[Tensor], None]) -> Any:
    return param.register_post_accumulate_grad_hook(hook)

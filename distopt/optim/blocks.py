"""Gradients of many parameters copied side by side, a block at a time so that each is read while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter

import torch
from torch import Tensor

from distopt.optim.bulk import places

_SIZE = 200  # parameters; what torch keeps of them fits a second-level cache together
_gradient = attrgetter("grad")


class Block:
    """Some parameters and the memory that their gradients are copied to.

    Args:
        params: contiguous; where they lie now is where they must lie when gradients are copied.
        target: shape (sum of numels,).
    """

    def __init__(self, params: tuple[Tensor, ...], target: Tensor) -> None:
        self.params = params
        self._places = places(params)
        rows = {(p.dim(), p.shape[1:]) for p in params}
        self._joined: Tensor | None = None
        self._views: list[Tensor] = []
        if len(rows) == 1 and params[0].dim() > 0:
            self._joined = target.view(-1, *params[0].shape[1:])
        else:
            segments = torch.split_with_sizes(target, [p.numel() for p in params])
            self._views = [s.view(p.shape) for s, p in zip(segments, params, strict=True)]

    def copy_(self, gradients: Sequence[Tensor] | None) -> bool:
        """Copies `gradients`, or each parameter's `.grad`; returns whether the parameters are where they were."""
        if places(self.params) != self._places:
            return False
        found = list(map(_gradient, self.params) if gradients is None else gradients)
        if self._joined is not None:
            torch.cat(found, out=self._joined)
        else:
            torch._foreach_copy_(self._views, found)
        return True


def blocks_of(params: tuple[Tensor, ...], buffer: Tensor) -> list[Block]:
    """Returns the blocks of `params`, whose gradients fill the 1-D `buffer` in their order."""
    ends = list(accumulate((p.numel() for p in params), initial=0))
    starts = range(0, len(params), _SIZE)
    return [Block(params[i : i + _SIZE], buffer[ends[i] : ends[min(i + _SIZE, len(params))]]) for i in starts]

"""What goes into a reduction and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.reduce.control import Heard
from distopt.reduce.local import num_shards


class Part(NamedTuple):
    """Reduced gradients of some parameters, side by side.

    In the steady state `names` and `params` are the same tuples at each step.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    buffer: Tensor


@dataclass
class Brought:
    """What one rank brings to a reduction.

    Attributes:
        params: the unconstrained tensors of this call.
        gradients: by place in the layout; None where this rank has none.
        complete: whether no gradient is None and none is sparse.
        addresses: where each gradient lies; None when one is missing or sparse, and when nobody has looked.
        news: parameters that the layout lacks or holds otherwise, with their gradients.
        own: (name, parameter, gradient) of parameters that belong to this rank alone.
        num_summed: over how many ranks the shared gradients are summed and not averaged; 1 for a mean.
    """

    params: Sequence[Tensor] = ()
    gradients: list[Tensor | None] = field(default_factory=list)
    complete: bool = False
    addresses: list[int] | None = None
    news: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    own: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    num_summed: int = 1

    def own_divisor(self, param: Tensor) -> float:
        """Returns by what the gradient of one of this rank's own is divided, to be of one scale with the shared ones.

        The density of its plate was multiplied by the number of shards; a sum over ranks is that much larger again.
        """
        return num_shards(param) / self.num_summed

    def own_square(self) -> float:
        """Returns the squared 2-norm of the gradients of this rank alone, as they will be stepped by."""
        total = 0.0
        for _, param, gradient in self.own:
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            wide = torch.complex128 if values.is_complex() else torch.float64
            total += (float(torch.linalg.vector_norm(values, dtype=wide)) / self.own_divisor(param)) ** 2
        return total


@dataclass
class Reduced:
    """The gradients that every rank steps by, equal on all ranks, and what the ranks have told each other."""

    heard: Heard
    brought: Brought | None = None  # what this rank gave
    dense: list[Part] = field(default_factory=list)
    loose: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    num_own: int = 0  # the last ones of `loose`: of this rank alone

    def norm(self) -> float:
        """Returns the 2-norm of the gradients that are equal on all ranks."""
        shared = [gradient for _, _, gradient in self.loose[: len(self.loose) - self.num_own]]
        parts = [part.buffer for part in self.dense] + [
            each.coalesce().values() if each.is_sparse else each for each in shared
        ]
        return math.sqrt(sum(float(part.abs().square().sum(dtype=torch.float64)) for part in parts))

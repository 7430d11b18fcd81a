"""The control slots: a few numbers that ride along with the gradients and say what the ranks must know of each other.

They are summed like gradients, in float32 or float64, so what must be exact is a small whole number. Whether all ranks
hold the same number d follows from two sums: n Σd² = (Σd)² exactly when they do (Cauchy and Schwarz). With d < 64 both
sums are exact in float32 for up to 4,096 ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from distopt.sharding import num_shards

DIGIT = 64
NUM_CHECKSUM_DIGITS = 8  # 48 bits

_ACTIVE, _NEWS, _ABORT, _FLAG, _NONFINITE, _VALUE, _NUM_VALUES, _OWN_SQUARE = range(8)
_STEP, _KIND = 8, 10
_CHECKSUM = 12
NUM_SLOTS = _CHECKSUM + 2 * NUM_CHECKSUM_DIGITS


class Kind(IntEnum):
    """What an active rank takes part in a round for."""

    GRADIENT = 1
    SCHEDULE = 2
    ABORT = 3
    AGREE = 4  # parameters are agreed on, nothing is stepped


@dataclass
class Control:
    """What one rank says in a round.

    A joined rank (not active) says nothing of step and kind: it follows.
    """

    step: int
    kind: Kind | None  # None: this rank has joined
    news: bool = False
    abort: bool = False
    flag: bool = False
    nonfinite: bool = False
    value: float | None = None  # the loss, or a schedule's metric
    own_square: float = 0.0  # of the gradients of this rank alone
    checksum: int = 0


@dataclass
class Heard:
    """The sums of a round."""

    num_active: int
    num_news: int
    num_abort: int
    num_flags: int
    num_nonfinite: int
    value: float | None  # mean over the ranks that gave one
    own_square: float
    kind: Kind | None
    in_step: bool  # all active ranks are in the same step, for the same kind
    in_sync: bool  # all ranks have the same checksum
    touched: list[float]  # per parameter of the layout, how many ranks have a gradient for it

    def steps(self, index: int) -> bool:
        """Whether this round's gradient of the parameter at a place in the layout is stepped by, not thrown away."""
        return self.in_step and not self.num_news and not self.num_abort and self.touched[index] > 0


def write_control(slots: Tensor, said: Control) -> None:
    """Writes into the first `NUM_SLOTS` elements of `slots`."""
    active = said.kind is not None
    numbers = [0.0] * NUM_SLOTS
    numbers[_ACTIVE] = float(active)
    numbers[_NEWS], numbers[_ABORT], numbers[_FLAG] = float(said.news), float(said.abort), float(said.flag)
    numbers[_NONFINITE], numbers[_OWN_SQUARE] = float(said.nonfinite), said.own_square
    if said.value is not None:
        numbers[_VALUE], numbers[_NUM_VALUES] = said.value, 1.0
    if said.kind is not None:
        for at, digit in ((_STEP, said.step % (DIGIT - 3)), (_KIND, int(said.kind))):
            numbers[at], numbers[at + 1] = float(digit), float(digit**2)
    checksum, at = said.checksum, _CHECKSUM
    while checksum:
        checksum, digit = divmod(checksum, DIGIT)
        numbers[at], numbers[at + 1] = float(digit), float(digit**2)
        at += 2
    fill_(slots[:NUM_SLOTS], numbers)


def fill_(slots: Tensor, numbers: float | list[float]) -> None:
    """Overwrites 1-D `slots` with numbers."""
    if slots.device.type == "cpu":
        slots.numpy()[:] = numbers  # a tenth of the time that a tensor of their own takes
    else:
        slots.copy_(torch.tensor(numbers, dtype=slots.dtype))


def read_control(slots: Tensor, world_size: int) -> Heard:
    """Reads the summed slots."""
    numbers: list[float] = slots.tolist()
    num_active, num_values = int(numbers[_ACTIVE]), int(numbers[_NUM_VALUES])
    in_step = _all_same(numbers, _STEP, num_active) and _all_same(numbers, _KIND, num_active)
    return Heard(
        num_active,
        int(numbers[_NEWS]),
        int(numbers[_ABORT]),
        int(numbers[_FLAG]),
        int(numbers[_NONFINITE]),
        numbers[_VALUE] / num_values if num_values else None,
        numbers[_OWN_SQUARE],
        Kind(round(numbers[_KIND] / num_active)) if num_active and in_step else None,
        in_step,
        all(_all_same(numbers, at, world_size) for at in range(_CHECKSUM, NUM_SLOTS, 2)),
        numbers[NUM_SLOTS:],
    )


def _all_same(numbers: list[float], at: int, count: int) -> bool:
    return count * int(numbers[at + 1]) == int(numbers[at]) ** 2


# What goes into a reduction and what comes out of it.


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

"""The control slots: a few numbers that are reduced with the gradients and say what ranks must know of each other.

They are summed like gradients, in float32 or float64, so whatever must be exact is a small whole number. Whether all
ranks hold the same number d follows from two sums: n Σd² = (Σd)² exactly when they do (Cauchy and Schwarz). With d < 64
both sums are exact in float32 for up to 4,096 ranks, so larger numbers are sent as several digits in base 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

BASE = 64
NUM_CHECKSUM_DIGITS = 8
"""Digits of a checksum in base 64, which are 48 bits."""
NUM_RNG_DIGITS = 4
"""Digits of what stands for a random generator's state, which are 24 bits."""
MAX_VALUES = 4
"""Numbers that a loss may be made of."""

# Index of each slot. A digit d takes two, for d and d²; a slot per parameter of the layout follows these.
_ACTIVE = 0
_CHANGED = 1
_ABORT = 2
_STOP = 3
_NONFINITE = 4
_VALUES = 5
_NUM_VALUES = _VALUES + MAX_VALUES  # how many ranks sent values
_LEN_VALUES = _NUM_VALUES + 1  # how many values each, summed over the ranks
_RANK_LOCAL_SQUARE = _LEN_VALUES + 1
_STEP = _RANK_LOCAL_SQUARE + 1
_KIND = _STEP + 2
_SCHEDULE_STEPS = _KIND + 2
_SKIPPED_CALLS = _SCHEDULE_STEPS + 2
_RNG = _SKIPPED_CALLS + 2
_CHECKSUM = _RNG + 2 * NUM_RNG_DIGITS
NUM_SLOTS = _CHECKSUM + 2 * NUM_CHECKSUM_DIGITS


PASSED = 2.0**-13
"""In the slot of a parameter, in place of 1, from a rank that passes it without a gradient: less than 1 in sum."""


class RoundKind(IntEnum):
    """Why an active rank takes part in a round."""

    GRADIENT = 1
    SCHEDULE = 2
    ABORT = 3
    AGREE = 4  # parameters are agreed on, nothing is stepped


@dataclass
class RankMessage:
    """What one rank tells the others in a round.

    Attributes:
        step: The step that the rank is at.
        kind: Why it takes part; None for a rank that has joined, which follows the others' step and kind.
        has_changes: Whether it has parameters that the layout lacks.
        stop: Whether it asks all ranks to stop.
        nonfinite: Whether a gradient of its rank-local parameters is not finite.
        values: Its loss (of up to `MAX_VALUES` numbers), or the metric of a schedule; empty for none.
        rank_local_square: Squared 2-norm of the gradients of its rank-local parameters.
        checksum: Of its replicas of parameters and optimizer state; 0 without drift watch.
        rng: Stands for the state of its random generator; 0 where that is not compared.
        schedule_steps: How many steps its learning-rate schedule has taken.
        skipped_calls: How many calls it seems to have left out since the last one, see `LoopCounters`.
    """

    step: int
    kind: RoundKind | None
    has_changes: bool = False
    stop: bool = False
    nonfinite: bool = False
    values: tuple[float, ...] = ()
    rank_local_square: float = 0.0
    checksum: int = 0
    rng: int = 0
    schedule_steps: int = 0
    skipped_calls: int = 0


@dataclass
class RoundSummary:
    """What all ranks know after a round: the sums of their messages, the same on each.

    Attributes:
        num_active: Ranks that have not joined.
        num_changed: Ranks that have parameters which the layout lacks.
        num_aborts: Ranks that have raised an error.
        num_stops: Ranks that ask to stop.
        num_nonfinite: Ranks with a gradient of a rank-local parameter that is not finite.
        mean_values: Means of the values, over the ranks that sent any; empty if none did.
        rank_local_square: Squared 2-norm of the gradients of all ranks' rank-local parameters together.
        kind: Why the active ranks took part; None if they differ, or none is active.
        in_step: Whether all active ranks are at the same step, for the same reason, as far as they can tell.
        in_sync: Whether all ranks have the same checksum.
        same_rng: Whether all active ranks have the same `rng`.
        touched: Number of ranks that have a gradient, by index of the parameter in the layout.
        missing: Indices of parameters that some rank has passed, and no rank has a gradient of.
    """

    num_active: int
    num_changed: int
    num_aborts: int
    num_stops: int
    num_nonfinite: int
    mean_values: tuple[float, ...]
    rank_local_square: float
    kind: RoundKind | None
    in_step: bool
    in_sync: bool
    same_rng: bool
    touched: list[float]
    missing: tuple[int, ...] = ()

    def is_stepped(self, index: int) -> bool:
        """Returns whether the parameter at `index` is stepped by this round's gradient, which else is thrown away."""
        return self.in_step and not self.num_changed and not self.num_aborts and self.touched[index] > 0


def write_message(slots: Tensor, message: RankMessage) -> None:
    """Writes a message into the first `NUM_SLOTS` elements of `slots`."""
    numbers = [0.0] * NUM_SLOTS
    numbers[_CHANGED] = float(message.has_changes)
    numbers[_STOP] = float(message.stop)
    numbers[_NONFINITE] = float(message.nonfinite)
    numbers[_RANK_LOCAL_SQUARE] = message.rank_local_square
    if message.values:
        numbers[_VALUES : _VALUES + len(message.values)] = message.values
        numbers[_NUM_VALUES] = 1.0
        numbers[_LEN_VALUES] = float(len(message.values))

    # Steps are compared modulo 61: ranks that are further apart by a multiple of it would be taken for equal. It is a
    # prime, so that the usual periods of a loop (an epoch of 64 or 100 steps) are no multiples of it.
    if message.kind is not None:
        numbers[_ACTIVE] = 1.0
        numbers[_ABORT] = float(message.kind is RoundKind.ABORT)
        _write_digit(numbers, _STEP, message.step % (BASE - 3))
        _write_digit(numbers, _KIND, int(message.kind))
        _write_digit(numbers, _SCHEDULE_STEPS, message.schedule_steps % (BASE - 3))
        _write_digit(numbers, _SKIPPED_CALLS, min(message.skipped_calls, BASE - 1))
        _write_number(numbers, _RNG, message.rng)

    _write_number(numbers, _CHECKSUM, message.checksum)
    write_slots_(slots[:NUM_SLOTS], numbers)


def write_slots_(slots: Tensor, numbers: float | list[float]) -> None:
    """Overwrites the 1-D `slots` with numbers."""
    if slots.device.type == "cpu":
        slots.numpy()[:] = numbers  # a tenth of the time that making a tensor of the numbers takes
    else:
        # A copy that blocks would wait until the device has done everything that was started before, backward included.
        slots.copy_(torch.tensor(numbers, dtype=slots.dtype), non_blocking=True)


def read_summary(slots: Tensor, world_size: int) -> RoundSummary:
    """Returns what the slots say after they have been summed over all ranks."""
    numbers: list[float] = slots.tolist()
    num_active = int(numbers[_ACTIVE])
    num_values = int(numbers[_NUM_VALUES])
    len_values = round(numbers[_LEN_VALUES] / num_values) if num_values else 0
    in_step = all(_all_equal(numbers, slot, num_active) for slot in range(_STEP, _RNG, 2))
    touched = numbers[NUM_SLOTS:]
    missing: tuple[int, ...] = ()
    if min(touched, default=1.0) < 1.0:
        missing = tuple(index for index, total in enumerate(touched) if 0.0 < total < 1.0)
        touched = [float(math.floor(total)) for total in touched]

    return RoundSummary(
        num_active=num_active,
        num_changed=int(numbers[_CHANGED]),
        num_aborts=int(numbers[_ABORT]),
        num_stops=int(numbers[_STOP]),
        num_nonfinite=int(numbers[_NONFINITE]),
        mean_values=tuple(total / num_values for total in numbers[_VALUES : _VALUES + len_values]),
        rank_local_square=numbers[_RANK_LOCAL_SQUARE],
        kind=RoundKind(round(numbers[_KIND] / num_active)) if num_active and in_step else None,
        in_step=in_step,
        in_sync=all(_all_equal(numbers, slot, world_size) for slot in range(_CHECKSUM, NUM_SLOTS, 2)),
        same_rng=all(_all_equal(numbers, slot, num_active) for slot in range(_RNG, _CHECKSUM, 2)),
        touched=touched,
        missing=missing,
    )


def _write_number(numbers: list[float], slot: int, number: int) -> None:
    while number:
        number, digit = divmod(number, BASE)
        _write_digit(numbers, slot, digit)
        slot += 2


def summary_of_one(message: RankMessage, num_params: int) -> RoundSummary:
    """Returns what a rank knows that is alone and has a gradient of every parameter."""
    return RoundSummary(
        num_active=1,
        num_changed=0,
        num_aborts=0,
        num_stops=int(message.stop),
        num_nonfinite=int(message.nonfinite),
        mean_values=message.values,
        rank_local_square=message.rank_local_square,
        kind=message.kind,
        in_step=True,
        in_sync=True,
        same_rng=True,
        touched=[1.0] * num_params,
    )


def _write_digit(numbers: list[float], slot: int, digit: int) -> None:
    numbers[slot] = float(digit)
    numbers[slot + 1] = float(digit**2)


def _all_equal(numbers: list[float], slot: int, count: int) -> bool:
    return count * int(numbers[slot + 1]) == int(numbers[slot]) ** 2

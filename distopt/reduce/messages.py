"""The control slots: a few numbers that are reduced with the gradients and say what ranks must know of each other.

They are summed like gradients, in float32 or float64, so whatever must be exact is a small whole number. Whether all
ranks hold the same number d follows from two sums: n Σd² = (Σd)² exactly when they do (Cauchy and Schwarz). With d < 64
both sums are exact in float32 for up to 4,096 ranks, so larger numbers are sent as several digits in base 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

BASE = 64
NUM_CHECKSUM_DIGITS = 8
"""Digits of a checksum in base 64, which are 48 bits."""

# Index of each slot. A digit d takes two, for d and d²; a slot per parameter of the layout follows these.
_ACTIVE = 0
_CHANGED = 1
_ABORT = 2
_STOP = 3
_NONFINITE = 4
_VALUE = 5
_NUM_VALUES = 6
_RANK_LOCAL_SQUARE = 7
_STEP = 8
_KIND = 10
_CHECKSUM = 12
NUM_SLOTS = _CHECKSUM + 2 * NUM_CHECKSUM_DIGITS


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
        value: Its loss, or the metric of a schedule.
        rank_local_square: Squared 2-norm of the gradients of its rank-local parameters.
        checksum: Of its replicas of parameters and optimizer state; 0 without drift watch.
    """

    step: int
    kind: RoundKind | None
    has_changes: bool = False
    stop: bool = False
    nonfinite: bool = False
    value: float | None = None
    rank_local_square: float = 0.0
    checksum: int = 0


@dataclass
class RoundSummary:
    """What all ranks know after a round: the sums of their messages, the same on each.

    Attributes:
        num_active: Ranks that have not joined.
        num_changed: Ranks that have parameters which the layout lacks.
        num_aborts: Ranks that have raised an error.
        num_stops: Ranks that ask to stop.
        num_nonfinite: Ranks with a gradient of a rank-local parameter that is not finite.
        mean_value: Mean of the values, over the ranks that sent one; None if none did.
        rank_local_square: Squared 2-norm of the gradients of all ranks' rank-local parameters together.
        kind: Why the active ranks took part; None if they differ, or none is active.
        in_step: Whether all active ranks are at the same step, for the same reason.
        in_sync: Whether all ranks have the same checksum.
        touched: Number of ranks that have a gradient, by index of the parameter in the layout.
    """

    num_active: int
    num_changed: int
    num_aborts: int
    num_stops: int
    num_nonfinite: int
    mean_value: float | None
    rank_local_square: float
    kind: RoundKind | None
    in_step: bool
    in_sync: bool
    touched: list[float]

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
    if message.value is not None:
        numbers[_VALUE] = message.value
        numbers[_NUM_VALUES] = 1.0

    # Steps are compared modulo 61: ranks that are further apart by a multiple of it would be taken for equal. It is a
    # prime, so that the usual periods of a loop (an epoch of 64 or 100 steps) are no multiples of it.
    if message.kind is not None:
        numbers[_ACTIVE] = 1.0
        numbers[_ABORT] = float(message.kind is RoundKind.ABORT)
        _write_digit(numbers, _STEP, message.step % (BASE - 3))
        _write_digit(numbers, _KIND, int(message.kind))

    checksum, slot = message.checksum, _CHECKSUM
    while checksum:
        checksum, digit = divmod(checksum, BASE)
        _write_digit(numbers, slot, digit)
        slot += 2
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
    in_step = _all_equal(numbers, _STEP, num_active) and _all_equal(numbers, _KIND, num_active)

    return RoundSummary(
        num_active=num_active,
        num_changed=int(numbers[_CHANGED]),
        num_aborts=int(numbers[_ABORT]),
        num_stops=int(numbers[_STOP]),
        num_nonfinite=int(numbers[_NONFINITE]),
        mean_value=numbers[_VALUE] / num_values if num_values else None,
        rank_local_square=numbers[_RANK_LOCAL_SQUARE],
        kind=RoundKind(round(numbers[_KIND] / num_active)) if num_active and in_step else None,
        in_step=in_step,
        in_sync=all(_all_equal(numbers, slot, world_size) for slot in range(_CHECKSUM, NUM_SLOTS, 2)),
        touched=numbers[NUM_SLOTS:],
    )


def summary_of_one(message: RankMessage, num_params: int) -> RoundSummary:
    """Returns what a rank knows that is alone and has a gradient of every parameter."""
    return RoundSummary(
        num_active=1,
        num_changed=0,
        num_aborts=0,
        num_stops=int(message.stop),
        num_nonfinite=int(message.nonfinite),
        mean_value=message.value,
        rank_local_square=message.rank_local_square,
        kind=message.kind,
        in_step=True,
        in_sync=True,
        touched=[1.0] * num_params,
    )


def _write_digit(numbers: list[float], slot: int, digit: int) -> None:
    numbers[slot] = float(digit)
    numbers[slot + 1] = float(digit**2)


def _all_equal(numbers: list[float], slot: int, count: int) -> bool:
    return count * int(numbers[slot + 1]) == int(numbers[slot]) ** 2

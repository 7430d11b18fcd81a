"""Whether a rank has left out a call, from the variables that count the loops around it.

Each rank counts its own calls, so a rank that leaves one out counts one less and knows nothing of it: its next call is
paired with the other ranks' call before. What does know is the script: in `for step in range(1000)` the variable has
risen by two since the last call. So the whole numbers among the variables of the calling functions are looked at in
each call. One that has risen by the same stride from call to call counts calls, and one that suddenly rises by a
multiple of it says how many were left out.

A script may have good reasons to leave out rows, as long as its ranks make equally many calls. So a jump on one rank
only leads to a comparison, and is an error only if the variable was equal on all ranks at every call before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import TypeAlias

from distopt.backends import Json

_LIBRARIES = frozenset(("distopt", "pyro", "torch", "contextlib", "lightning", "pytorch_lightning"))
_NUM_FRAMES = 3  # calling functions that are looked at: a script's helper, its epoch, its main function
_MIN_STRIDES = 2  # equal ones in a row, before a variable is taken for one that counts calls
_SEARCH_EVERY = 64  # calls; all variables are looked at in the first few of them, and then only those that change
_SEARCH_CALLS = 4


_Key: TypeAlias = tuple[CodeType, str]


@dataclass
class _Counter:
    """A variable that may count calls."""

    value: int
    previous: int
    stride: int = 0
    num_strides: int = 0  # in a row, up to the call before
    jump: int = 0  # calls that it has passed over since the last one


class LoopCounters:
    """The variables around an optimizer's calls that count them."""

    def __init__(self) -> None:
        self._counters: dict[_Key, _Counter] = {}
        self._num_calls = 0

    def count_skipped(self) -> int:
        """Returns how many calls seem to have been left out since the last one; to be called once in each call.

        A variable that goes on by its stride outweighs others that jump: `while done < 100:` may try and fail often.
        """
        is_search = self._num_calls % _SEARCH_EVERY < _SEARCH_CALLS
        self._num_calls += 1
        if not is_search:
            self._counters = {key: counter for key, counter in self._counters.items() if counter.stride}
            if not self._counters:
                return 0

        counters: dict[_Key, _Counter] = {}
        jumps = [0]
        is_regular = False
        for key, value in _variables(None if is_search else self._counters):
            counter = counters[key] = self._next(self._counters.get(key), value)
            if counter.num_strides > _MIN_STRIDES:
                is_regular |= not counter.jump
            if counter.jump:
                jumps.append(counter.jump)
        self._counters = counters
        return 0 if is_regular else max(jumps)

    def _next(self, last: _Counter | None, value: int) -> _Counter:
        if last is None:
            return _Counter(value, value)
        rise = value - last.value
        if rise > 0 and rise == last.stride:
            return _Counter(value, last.value, rise, last.num_strides + 1)
        if rise > 0 and last.num_strides >= _MIN_STRIDES and rise % last.stride == 0:
            return _Counter(value, last.value, last.stride, last.num_strides, jump=rise // last.stride - 1)
        return _Counter(value, last.value, rise, 1 if rise > 0 else 0)

    def describe(self) -> Json:
        """Returns the variables that count calls, with their values in the last call and in this one."""
        return {
            f"{name} in {code.co_name} ({code.co_filename.rpartition('/')[2]})": [counter.previous, counter.value]
            for (code, name), counter in self._counters.items()
            if counter.num_strides >= _MIN_STRIDES
        }


def explain_skipped(counters: Sequence[Mapping[str, Sequence[int]]]) -> str | None:
    """Returns a sentence on the variable that tells which ranks left out a call; None if there is no proof.

    Args:
        counters: What `LoopCounters.describe` returned on each rank that makes calls.
    """
    for name in sorted(set.intersection(*map(set, counters))):
        before = {each[name][0] for each in counters}
        if len(before) == 1 and len({each[name][1] for each in counters}) > 1:
            values = ", ".join(str(each[name][1]) for each in counters)
            return f"the variable {name} was {before.pop()} on all of them in their last call and is now {values}"
    return None


def _variables(known: Collection[_Key] | None) -> Iterator[tuple[_Key, int]]:
    """Yields the whole numbers among the local variables of the functions that call distopt, innermost first.

    Args:
        known: Those to look at; None for all.
    """
    frame: FrameType | None = sys._getframe(2)
    num_frames = 0
    while frame is not None and num_frames < _NUM_FRAMES:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _LIBRARIES:
            num_frames += 1
            yield from _whole_numbers(frame, known)
        frame = frame.f_back


# Before Python 3.13 a function's `f_locals` is a copy that the frame keeps: it would hold on to the batch of the last
# step, tensors of gigabytes. So it is emptied, unless somebody else has it from a call of `locals()`: its references
# are then more than the frame's, this function's and the one that is counted for the call of `getrefcount`. Python
# fills it anew whenever it is asked for.
def _whole_numbers(frame: FrameType, known: Collection[_Key] | None) -> Iterator[tuple[_Key, int]]:
    code = frame.f_code
    names = None if known is None else [name for of_code, name in known if of_code is code]
    if names == []:
        return
    variables = frame.f_locals
    for name in list(variables) if names is None else names:
        value = variables.get(name)
        if type(value) is int:
            yield (code, name), value
    is_copy = code.co_flags & inspect.CO_OPTIMIZED and isinstance(variables, dict)
    if is_copy and sys.getrefcount(variables) == 3:
        variables.clear()

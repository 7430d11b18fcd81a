"""Which groups of parameters are joined, since they have long been stepped together.

A parameter that appears makes a group of its own, and so does what is split off. Groups are joined if many calls in a
row have stepped them whole, as they do with the parameters of a model that grows. That is done at two times. While it
grows, when a key has too many packed groups: the small ones first, and a larger one only with what has half its size,
so that each parameter is copied a number of times that is the logarithm of their number. And when a plan has been used
for `STEADY_CALLS` calls: all of its groups, lists too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from distopt.optim.groups import ListGroup, PackedGroup, ParamRecord

STEADY_CALLS = 16
"""Equal calls after which the groups that they step are joined: a join takes as long as a few steps of its members."""

_MIN_IN_ROW = 4  # calls that have stepped a group: that the same part of a model is touched so often is no chance


def steady(groups: Iterable[PackedGroup | ListGroup]) -> Iterator[tuple[list[PackedGroup], list[ListGroup]]]:
    """Yields packed groups and lists that may be joined, those of one key together."""
    by_key: dict[Hashable, list[PackedGroup | ListGroup]] = defaultdict(list)
    for group in groups:
        if group.num_in_row >= STEADY_CALLS - 1 and not (isinstance(group, ListGroup) and group.is_final):
            by_key[group.members[0].key].append(group)
    for same_key in by_key.values():
        packed = [group for group in same_key if isinstance(group, PackedGroup)]
        yield packed, [group for group in same_key if isinstance(group, ListGroup)]


def is_growing(groups: Sequence[PackedGroup], num_calls: int) -> bool:
    """Returns whether the last call, number `num_calls`, has stepped all of `groups` whole, but for those just made."""
    return all(group.last_call in (0, num_calls) for group in groups)


def num_orders(groups: Sequence[PackedGroup]) -> int:
    """Returns the orders of magnitude up to all members together: a growing model has a group of each."""
    return sum(len(group.members) for group in groups).bit_length()


def smaller(groups: Sequence[PackedGroup], num_calls: int) -> list[PackedGroup]:
    """Returns the smaller ones of a key's packed groups, which are sorted by size, largest first.

    Each is at most twice as large as all those before it, so at a join every parameter's group grows by half.
    """
    chosen: list[PackedGroup] = []
    num_members = 0
    for group in reversed(groups):
        if group.num_in_row < _MIN_IN_ROW or group.last_call < num_calls:
            continue
        if len(group.members) > 2 * num_members:
            if len(chosen) > 1:
                break
            chosen = []
            num_members = 0
        chosen.append(group)
        num_members += len(group.members)
    return chosen


def equal(groups: Sequence[PackedGroup], staggers: Callable[[ParamRecord], bool]) -> Iterator[list[PackedGroup]]:
    """Yields those of a key's packed groups that may be one, several at a time."""
    if len(groups) < 2:
        return
    by_key: dict[Any, list[PackedGroup]] = defaultdict(list)
    for group in groups:
        by_key[group.key(staggered=staggers(group.members[0]))].append(group)
    by_key.pop(None, None)
    yield from (mates for mates in by_key.values() if len(mates) > 1)

"""Who is stepped with whom: places parameters into groups, parts them and brings them together again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from distopt.optim.aliases import num_forgotten_aliases
from distopt.optim.capabilities import drifts, packs, switches
from distopt.optim.groups import Construct, ListGroup, Member, PackedGroup
from distopt.optim.packing import num_aliases
from distopt.optim.state import State, frozen, hyper_of, life_of, optimizer_of, optimizer_part

MAX_PACKED = 8
"""Packed groups of one key before the smaller ones are listed together, so that groups do not multiply."""

_SPLINTER = 16
_MAX_SEARCHES = 8  # for holders of a parameter's memory: each takes a while

Placed = tuple[Member, State | None]


class Grouping:
    """The groups of one optimizer.

    Args:
        constructor: the torch optimizer class that the user chose.
        construct: see `Construct`.
        scheduled: whether it builds schedulers; their state tells nothing of one parameter among several.
    """

    def __init__(self, constructor: Any, construct: Construct, scheduled: bool = False) -> None:
        self._constructor = constructor
        self._construct = construct
        self._scheduled = scheduled
        self._packed: dict[Hashable, list[PackedGroup]] = defaultdict(list)
        self._listed: dict[Hashable, list[ListGroup]] = defaultdict(list)
        self._num_searches = 0

    def __iter__(self) -> Iterator[PackedGroup | ListGroup]:
        for groups in (self._packed, self._listed):
            for same_key in groups.values():
                yield from same_key

    def place(self, placed: Iterable[Placed], packing: bool = True) -> None:
        """Puts parameters that are in no group into one, those of one life together.

        Args:
            placed: parameters, each with its state; None for one without any.
            packing: whether their bytes may be moved side by side.
        """
        placed = list(placed)
        buckets: dict[tuple[Hashable, ...], list[Placed]] = defaultdict(list)
        packing = packing and packs(self._constructor)
        movable = self._movable([m for m, _ in placed if packing and not m.alone])
        for m, state in placed:
            life = life_of(state, m.param.numel())
            if m.alone:
                buckets["alone", id(m)].append((m, state))
            elif id(m) in movable and life is not None:
                buckets["packed", m.key, life].append((m, state))
            elif drifts(m.args) and self._scheduled:
                m.alone = True
                buckets["alone", id(m)].append((m, state))
            elif drifts(m.args):
                buckets["listed", m.key, state is None].append((m, state))
            else:
                like = None if state is None else (hyper_of(optimizer_part(state)["param_groups"][0]), _schedule(state))
                buckets["listed", m.key, like].append((m, state))
        for (kind, *_), bucket in buckets.items():
            members = [m for m, _ in bucket]
            states = [s for _, s in bucket if s is not None] or None
            # Where lives have long parted, splinters of groups are not worth a call each.
            splinter = states and len(members) < _SPLINTER and self._listed.get(members[0].key)
            if kind == "packed" and not splinter:
                self._packed[members[0].key].append(self._pack(members, states))
            else:
                self._list(members, states)
        if packing:
            self._bound()

    def extract(self, members: Iterable[Member]) -> list[tuple[Member, State]]:
        """Takes `members` out of their groups and returns them with their states; the others stay together."""
        leaving = {id(m): m for m in members}
        result: list[tuple[Member, State]] = []
        for group in {id(m.group): m.group for m in leaving.values()}.values():
            if group is None:
                continue
            states = list(zip(group.members, group.states(), strict=True))
            result += [(m, s) for m, s in states if id(m) in leaving]
            if isinstance(group, PackedGroup):
                self._packed[group.members[0].key].remove(group)
                self.place((m, s) for m, s in states if id(m) not in leaving)
            elif isinstance(group, ListGroup) and all(id(m) in leaving for m in group.members):
                self._listed[group.members[0].key].remove(group)
            elif isinstance(group, ListGroup):
                group.remove(set(leaving))
        for m in leaving.values():
            m.group = None
        return result

    def unpack(self, members: Sequence[Member]) -> bool:
        """Takes those of `members` that are packed out of their groups and lists them; returns whether there were any.

        So they can go on without a step, when a step is more than what gradients do.
        """
        packed = [m for m in members if isinstance(m.group, PackedGroup)]
        if packed:
            self.place(self.extract(packed), packing=False)
        return bool(packed)

    def part(self, touched: Sequence[Member]) -> bool:
        """Parts each packed group of which `touched` are some but not all, so that no group is stepped in half.

        Returns:
            Whether there was one.
        """
        parted = False
        ids = {id(m) for m in touched}
        for group in {id(m.group): m.group for m in touched}.values():
            if isinstance(group, PackedGroup) and not all(id(m) in ids for m in group.members):
                self.place(self.extract([m for m in group.members if id(m) in ids]))
                parted = True
        return parted

    def _bound(self) -> None:
        """Lists the smaller packed groups of a key together when there are too many of them."""
        for key, groups in list(self._packed.items()):
            if len(groups) > MAX_PACKED:
                groups.sort(key=lambda g: -len(g.members))
                least = sum(len(g.members) for g in groups) // (2 * MAX_PACKED)
                kept = sum(len(g.members) > least for g in groups[: MAX_PACKED // 2])
                small = groups[kept:]
                del groups[kept:]
                states = [pair for g in small for pair in zip(g.members, g.states(), strict=True)]
                self.place(states, packing=False)
            if not groups:
                del self._packed[key]

    def _movable(self, members: Sequence[Member]) -> set[int]:
        """Returns the ids of those members whose parameters may be packed."""
        found = {id(m): num_aliases(m.param) for m in members}
        at: dict[int, Member] = {}
        for m in members:  # two tensors over one array of numpy, of which torch knows nothing
            other = at.setdefault(m.param.data_ptr(), m) if found[id(m)] < math.inf else m
            if other is not m:
                found[id(m)] = found[id(other)] = math.inf
        doubtful = [m for m in members if 0 < found[id(m)] < math.inf]
        if doubtful and self._num_searches < _MAX_SEARCHES:
            self._num_searches += 1
            for m, forgotten in zip(doubtful, num_forgotten_aliases([m.param for m in doubtful]), strict=True):
                found[id(m)] -= forgotten
        return {i for i, number in found.items() if number <= 0}

    def _extra(self, member: Member, listed: bool) -> dict[str, Any]:
        p = member.param
        return {} if member.alone else switches(self._constructor, member.args, p.dtype, p.device.type, listed)

    def _pack(self, members: list[Member], states: list[State] | None) -> PackedGroup:
        return PackedGroup(members, self._construct, self._extra(members[0], listed=False), states)

    def _list(self, members: list[Member], states: list[State] | None) -> None:
        first = members[0]
        group = ListGroup(members, self._construct, self._extra(first, listed=True), states)
        same_key = self._listed[first.key]
        if not first.alone:
            like = _likeness(group)
            for other in same_key:
                if not other.alone and other.extra == group.extra and _likeness(other) == like:
                    other.absorb(group)
                    return
        same_key.append(group)


def _schedule(state: State) -> Hashable:
    return frozen(state.get("scheduler"))  # type: ignore[no-any-return]


def _likeness(group: ListGroup) -> Hashable:
    """What two list groups must have in common to become one."""
    if group.is_apart:
        return "apart"
    handle = group.handle
    schedule = frozen(handle.state_dict()) if hasattr(handle, "optimizer") else None
    return (hyper_of(optimizer_of(handle).param_groups[0]), schedule)

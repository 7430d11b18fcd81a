"""Which parameters are stepped together: puts them into groups, splits groups, and joins what has become equal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from distopt.optim import joining
from distopt.optim.aliases import num_forgotten_aliases
from distopt.optim.capabilities import drifts, name_of, packs, packs_exactly, switches
from distopt.optim.groups import Construct, ListGroup, PackedGroup, ParamRecord
from distopt.optim.packing import num_aliases
from distopt.optim.staggered import staggers
from distopt.optim.state import (
    State,
    check_state,
    frozen,
    hyper_key,
    is_scheduler,
    optimizer_of,
    optimizer_state,
    packing_key,
)

# How groups split and join
#
# Parameters begin together: all that are first seen in one call, with equal arguments, dtype and device, make one
# packed group. A call that touches some members of a packed group only splits it, since one flat tensor has one number
# of steps: the touched ones leave with a copy of their state and make a group by themselves. So each different subset
# costs a copy, once, and a group more at every step after.
#
# The number of groups must stay small. A model of minibatches may touch another half of its parameters at each step,
# and after n steps every parameter would have a group. So a key (equal arguments, dtype, device) keeps few packed
# groups: when there are more than MAX_PACKED, the smaller ones are listed together, in one group in which each
# parameter counts its own steps. And once there is such a list, what splits off with fewer than _MIN_PACKED members
# goes there at once.
# Lists are slower per parameter than packed groups, and their cost does not depend on which parameters a call touches.
#
# Groups are joined again where parameters are assigned anew: members that were moved, loaded or split off at one time
# are sorted by `packing_key`, so those that have become equal share a group. And they are joined where many calls in a
# row have stepped them whole, see `joining`.

MAX_PACKED = 8
"""Packed groups of one key before the smaller ones are listed together, so that groups do not multiply."""

_MIN_PACKED = 16
_REGROUPS = {"lrd", "lr_decay"}  # hyper-parameters that decide which parameters may be stepped together
_MAX_SEARCHES = 8  # for holders of a parameter's memory: each takes about 0.1 s

Assignment = tuple[ParamRecord, State | None]
"""A parameter that is in no group, and its state; None for one not stepped yet."""


class Grouping:
    """The groups of one optimizer.

    Args:
        constructor: The torch optimizer class that the user chose.
        construct: See `Construct`.
        scheduled: Whether it builds schedulers; their state tells nothing of one parameter among several.
    """

    def __init__(self, constructor: Any, construct: Construct, scheduled: bool = False) -> None:
        self.constructor = constructor
        self._construct = construct
        self._scheduled = scheduled
        self._packed: dict[Hashable, list[PackedGroup]] = defaultdict(list)
        self._listed: dict[Hashable, list[ListGroup]] = defaultdict(list)
        self._num_searches = 0
        self._num_calls = 0
        self._edits: dict[int, tuple[ParamRecord, dict[str, Any]]] = {}

    def __iter__(self) -> Iterator[PackedGroup | ListGroup]:
        for groups in (self._packed, self._listed):
            for same_key in groups.values():
                yield from same_key

    def arrange(
        self,
        members: Sequence[ParamRecord],
        missing: Sequence[ParamRecord],
        claim: Callable[[ParamRecord], State | None],
    ) -> bool:
        """Sees to it that every parameter of a call is in a group, and that no group is touched in part.

        Args:
            members: The parameters of the call.
            missing: Those of them that have no gradient, and so are not stepped.
            claim: Returns the state with which a parameter that is in no group begins; called once for each.

        Returns:
            Whether any parameter changed its group.
        """
        changed = False
        groups = {id(m.group): m.group for m in members if m.group is not None}
        whole = {i for i, group in groups.items() if group.is_whole()}
        moved = [m for m in members if m.group is not None and id(m.group) not in whole and m.group.has_lost(m)]
        if moved:
            self.assign(_with_new_keys(self.extract(_with_mates(moved))))
            changed = True

        untouched = set(map(id, missing))
        touched = [m for m in members if id(m) not in untouched]
        for records in (touched, missing):
            new = [m for m in records if m.group is None]
            if new:
                self.assign([(m, claim(m)) for m in new])
                changed = True
        changed |= self._list_packed([m for m in missing if drifts(m.args)])
        changed |= self._split(touched)
        return changed

    def assign(self, assignments: Iterable[Assignment], packing: bool = True) -> None:
        """Puts parameters that are in no group into one, those with equal states together.

        Args:
            assignments: Parameters, each with its state.
            packing: Whether their bytes may be moved side by side.
        """
        assignments = list(assignments)
        if not assignments:
            return
        buckets: dict[tuple[Hashable, ...], list[Assignment]] = defaultdict(list)
        packing = packing and packs(self.constructor)
        movable = self._movable([m for m, _ in assignments if packing and not m.alone])
        for m, state in assignments:
            buckets[self._bucket(m, state, id(m) in movable)].append((m, state))

        for (kind, *_), bucket in buckets.items():
            members = [m for m, _ in bucket]
            states = [s for _, s in bucket if s is not None] or None
            few = states and len(members) < _MIN_PACKED and self._listed.get(members[0].key)
            if kind == "packed" and not few:
                self._packed[members[0].key].append(self._pack(members, states))
            else:
                self._list(members, states)
        if packing:
            self._limit_packed()

    def _bucket(self, m: ParamRecord, state: State | None, movable: bool) -> tuple[Hashable, ...]:
        """Returns what parameters must share to come into one group, its kind first; may set `m.alone`."""
        key = packing_key(state, m.param.numel(), staggered=self._staggers(m))
        if not m.alone and movable and key is not None:
            return ("packed", m.key, key)
        if not m.alone and drifts(m.args):
            if not self._scheduled:
                return ("listed", m.key, state is None)
            m.alone = True  # the schedule and the optimizer both change its rate
        if m.alone:
            return ("alone", id(m))
        if state is None:
            return ("listed", m.key, None)
        return ("listed", m.key, hyper_key(optimizer_state(state)["param_groups"][0]), frozen(state.get("scheduler")))

    def extract(self, members: Iterable[ParamRecord]) -> list[tuple[ParamRecord, State]]:
        """Takes `members` out of their groups and returns them with their states; the others stay together."""
        leaving = {id(m): m for m in members}
        extracted: list[tuple[ParamRecord, State]] = []
        staying: list[list[Assignment]] = []

        for group in {id(m.group): m.group for m in leaving.values()}.values():
            if isinstance(group, PackedGroup):
                states = list(zip(group.members, group.states(), strict=True))
                extracted += [(m, s) for m, s in states if id(m) in leaving]
                self._packed[group.members[0].key].remove(group)
                staying.append([(m, s) for m, s in states if id(m) not in leaving])
            elif isinstance(group, ListGroup):
                of_group = [m for m in group.members if id(m) in leaving]
                extracted += zip(of_group, group.states(of_group), strict=True)
                if len(of_group) == len(group.members):
                    self._listed[group.members[0].key].remove(group)
                else:
                    group.remove(set(leaving))
        for m in leaving.values():
            m.group = None
        for rest in staying:  # when all have left: to assign may list or join any group, also one of those above
            self.assign(rest)
        return extracted

    # A user's loop sets the learning rate of one parameter after the other. If each of them left its group at once, a
    # thousand would cost a million copies; so what is set is collected, and parameters are regrouped before anything
    # depends on it. Where all members of a group got the same, they stay together.

    def edit(self, m: ParamRecord, key: str, value: Any) -> None:
        """Sets a hyper-parameter of one parameter; takes effect in `settle`."""
        self._edits.setdefault(id(m), (m, {}))[1][key] = value

    def edits_of(self, m: ParamRecord) -> dict[str, Any]:
        """Returns what `edit` has set for a parameter since the last `settle`."""
        return self._edits[id(m)][1] if id(m) in self._edits else {}

    def settle(self) -> bool:
        """Applies what `edit` has set; returns whether any parameter changed its group."""
        if not self._edits:
            return False
        edits, self._edits = self._edits, {}
        leaving: list[ParamRecord] = []
        for group in {id(m.group): m.group for m, _ in edits.values() if m.group is not None}.values():  # not removed
            changes = [edits[id(m)][1] if id(m) in edits else {} for m in group.members]
            if isinstance(group, ListGroup) and not group.shares_hyper:
                for m, change in zip(group.members, changes, strict=True):
                    group.hyper_of(m).update(change)
            elif group.shares_hyper and changes.count(changes[0]) == len(changes) and not _REGROUPS & changes[0].keys():
                group.hyper_of(group.members[0]).update(changes[0])
            else:
                leaving += [m for m, change in zip(group.members, changes, strict=True) if change]

        extracted = self.extract(leaving)
        for m, state in extracted:
            change = edits[id(m)][1]
            optimizer_state(state)["param_groups"][0].update(change)
            if "lrd" in change:  # decides how the parameter is grouped
                m.args = m.args | {"lrd": change["lrd"]}
                m.key = ((m.key[0], change["lrd"]), *m.key[1:])
        self.assign(extracted)
        return bool(extracted)

    def set_alone(self, m: ParamRecord) -> bool:
        """Gives `m` a torch optimizer for it alone from now on; returns whether it had none."""
        if m.alone:
            return False
        assignments = self.extract([m]) if m.group is not None else []
        m.alone = True
        self.assign(assignments)
        return True

    def check(self, m: ParamRecord, state: State) -> None:
        """Raises ValueError unless `state` may be that of `m`."""
        handle = m.group.handle if m.group is not None else self._construct([m.param], m.args)
        hyper = set(optimizer_of(handle).param_groups[0])
        name = name_of(self.constructor)
        check_state(m.name, state, m.param, hyper, is_scheduler(handle), name, packs(self.constructor))

    def _list_packed(self, members: Sequence[ParamRecord]) -> bool:
        """Lists those of `members` that are packed, so that they can live through a call without a step."""
        packed = [m for m in members if isinstance(m.group, PackedGroup)]
        if packed:
            self.assign(self.extract(packed), packing=False)
        return bool(packed)

    def _split(self, touched: Sequence[ParamRecord]) -> bool:
        """Splits each packed group of which `touched` are some but not all; returns whether there was one."""
        ids = {id(m) for m in touched}
        groups = {id(m.group): m.group for m in touched if isinstance(m.group, PackedGroup)}
        for group in groups.values():
            if not ids.issuperset(map(id, group.members)):
                self.assign(self.extract([m for m in group.members if id(m) in ids]))
                self._split(touched)  # to assign may have joined others with groups that this call does not touch
                return True
        return False

    def _limit_packed(self) -> None:
        """Lists the smaller packed groups of a key together when there are too many of them.

        At most half of the allowed number stay, and only those of at least half the average size: else the next split
        would list again, and each listing copies the state of all its members.
        """
        for key, groups in list(self._packed.items()):
            if len(groups) > MAX_PACKED:
                groups.sort(key=lambda g: -len(g.members))
                may_grow = joining.is_growing(groups, self._num_calls)
                if may_grow and (
                    len(groups) <= MAX_PACKED + joining.num_orders(groups)
                    or self._join(joining.smaller(groups, self._num_calls))
                ):
                    continue
                least = sum(len(g.members) for g in groups) // (2 * MAX_PACKED)
                num_kept = sum(len(g.members) > least for g in groups[: MAX_PACKED // 2])
                small = groups[num_kept:]
                del groups[num_kept:]
                states = [pair for g in small for pair in zip(g.members, g.states(), strict=True)]
                self.assign(states, packing=False)
            if not groups:
                del self._packed[key]

    # Joining.

    def note_call(self, whole: Iterable[PackedGroup | ListGroup]) -> None:
        """Notes that a call of the optimizer steps all members of the groups `whole`."""
        self._num_calls += 1
        for group in whole:
            group.num_in_row = group.num_in_row + 1 if group.last_call == self._num_calls - 1 else 1
            group.last_call = self._num_calls

    def join_steady(self, groups: Iterable[PackedGroup | ListGroup]) -> bool:
        """Joins those of `groups` that can be stepped as one and were long stepped together; returns whether any."""
        joined = False
        for packed, listed in joining.steady(groups):
            if listed:
                self._num_searches = min(self._num_searches, _MAX_SEARCHES - 1)
                members = [m for group in packed for m in group.members]
                members += [m for group in listed for m in group.members]
                self.assign(self._extract_sorted(members))
                for m in members:
                    if isinstance(m.group, ListGroup):
                        m.group.is_final = True
            joined |= bool(listed) or self._join(packed)
        return joined

    def _join(self, groups: Sequence[PackedGroup]) -> bool:
        """Makes one group of each set of packed groups that may be one; returns whether there were any."""
        joined = False
        for mates in joining.equal(groups, self._staggers):
            members = [m for group in mates for m in group.members]
            if len(self._movable(members)) == len(members):
                assignments = self._extract_sorted(members)
                packed = self._pack([m for m, _ in assignments], [s for _, s in assignments if s is not None])
                self._packed[members[0].key].append(packed)
                joined = True
        return joined

    def _extract_sorted(self, members: Iterable[ParamRecord]) -> list[tuple[ParamRecord, State]]:
        # In the order of names, in which a bucket's gradients lie too, so that they need not be copied.
        return sorted(self.extract(members), key=lambda assignment: assignment[0].name)

    def _staggers(self, m: ParamRecord) -> bool:
        return not self._scheduled and staggers(self.constructor, m.args, m.param.dtype)

    def _movable(self, members: Sequence[ParamRecord]) -> set[int]:
        """Returns the ids of those members whose parameters may be packed."""
        num_others = {id(m): num_aliases(m.param) if packs_exactly(m.param, m.args) else math.inf for m in members}
        at: dict[int, ParamRecord] = {}
        for m in members:  # two tensors over one array of numpy, of which torch knows nothing
            other = at.setdefault(m.param.data_ptr(), m) if num_others[id(m)] < math.inf else m
            if other is not m:
                num_others[id(m)] = num_others[id(other)] = math.inf

        doubtful = [m for m in members if 0 < num_others[id(m)] < math.inf]
        if doubtful and self._num_searches < _MAX_SEARCHES:
            self._num_searches += 1
            for m, forgotten in zip(doubtful, num_forgotten_aliases([m.param for m in doubtful]), strict=True):
                num_others[id(m)] -= forgotten
        return {i for i, number in num_others.items() if number <= 0}

    def _switches(self, member: ParamRecord, listed: bool) -> dict[str, Any]:
        p = member.param
        return {} if member.alone else switches(self.constructor, member.args, p.dtype, p.device.type, listed)

    def _pack(self, members: list[ParamRecord], states: list[State] | None) -> PackedGroup:
        return PackedGroup(members, self._construct, self._switches(members[0], listed=False), states)

    def _list(self, members: list[ParamRecord], states: list[State] | None) -> None:
        """Makes a list of `members`, or adds them to one with the same hyper-parameters."""
        first = members[0]
        group = ListGroup(members, self._construct, self._switches(first, listed=True), states)
        same_key = self._listed[first.key]
        if not first.alone:
            key = _list_key(group)
            for other in same_key:
                if not other.alone and other.switches == group.switches and _list_key(other) == key:
                    other.absorb(group)
                    return
        same_key.append(group)


def _with_mates(moved: Sequence[ParamRecord]) -> list[ParamRecord]:
    """Returns all members of the packed groups that `moved` were in, and the moved ones.

    A flat tensor is of no use once one of its slices is elsewhere, so all of its members are packed again.
    """
    groups = {id(m.group): m.group for m in moved if isinstance(m.group, PackedGroup)}
    mates = [m for g in groups.values() for m in g.members]
    return mates + [m for m in moved if not isinstance(m.group, PackedGroup)]


def _with_new_keys(extracted: list[tuple[ParamRecord, State]]) -> list[tuple[ParamRecord, State]]:
    """Notes the new dtype, device and order of memory of parameters that were moved."""
    for m, _ in extracted:
        args, clip, _, _, birth = m.key
        m.key = (args, clip, m.param.dtype, m.param.device, birth)
        m.alone |= not m.param.is_contiguous()
    return extracted


def _list_key(group: ListGroup) -> Hashable:
    """Returns what two list groups must have in common to become one."""
    if not group.shares_hyper:
        return "separate"
    handle = group.handle
    schedule = frozen(handle.state_dict()) if is_scheduler(handle) else None
    return (hyper_key(optimizer_of(handle).param_groups[0]), schedule)

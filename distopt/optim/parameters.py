"""Which parameters the optimizer knows, by which names, and which of them the parameter store has let go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import pyro
from torch import Tensor

from distopt.optim.groups import Member
from distopt.optim.packing import same
from distopt.optim.state import State, copied


class _Sorted(NamedTuple):
    """All members, sorted by name."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    ids: tuple[int, ...]
    members: tuple[Member, ...]

    @classmethod
    def of(cls, members: Iterable[Member]) -> _Sorted:
        found = tuple(sorted(members, key=attrgetter("name")))
        tensors = tuple(m.param for m in found)
        return cls(tuple(m.name for m in found), tensors, tuple(map(id, tensors)), found)


class Roster:
    """The parameters that an optimizer has seen, by identity.

    A parameter that leaves the store leaves the roster. Should it come back (as with `ParamStoreDict.scope`), it
    goes on where it was: its state is kept for as long as somebody else keeps the tensor alive.
    """

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._parted: dict[int, tuple[Any, State]] = {}
        self._num_unnamed = 0
        self._sorted: _Sorted | None = None

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._members.values()))

    def __len__(self) -> int:
        return len(self._members)

    def get(self, param: Tensor) -> Member | None:
        """Returns what is known of `param`, None when it was never seen."""
        return self._members.get(id(param))

    def add(self, member: Member) -> None:
        """Takes in a new parameter."""
        self._sorted = None
        self._members[id(member.param)] = member

    def known(self, params: Sequence[Tensor]) -> list[Member] | None:
        """Returns the members of `params`, each once, sorted by name.

        None when one of them is new, or when the store does not hold every member by its name any more.
        """
        names, tensors, ids, members = self._by_name()
        if not same(tuple(map(pyro.get_param_store()._params.get, names)), tensors):
            return None
        wanted = set(map(id, params))
        found = list(compress(members, map(wanted.__contains__, ids)))
        return found if len(found) == len(wanted) else None

    def is_in_store(self) -> bool:
        """Returns whether the store holds every member by its name, and no tensor by two names."""
        store = pyro.get_param_store()._params
        names, tensors, *_ = self._by_name()
        is_held = same(tuple(map(store.get, names)), tensors)
        return is_held and len(set(map(id, store.values()))) == len(store)

    def _by_name(self) -> _Sorted:
        if self._sorted is None:
            self._sorted = _Sorted.of(self._members.values())
        return self._sorted

    def names(self, params: Iterable[Tensor]) -> list[str]:
        """Returns the name of each of `params`; names outlive the store, strangers get one."""
        store = pyro.get_param_store()
        known = {id(p): name for name, p in store.named_parameters()}
        return [known.get(id(p)) or store.param_name(p) or self._kept_name(p) for p in params]

    def _kept_name(self, param: Tensor) -> str:
        member = self._members.get(id(param))
        if member is not None:
            return member.name
        self._num_unnamed += 1
        return f"unnamed {self._num_unnamed}"

    def left(self, touched: Iterable[Member]) -> list[Member]:
        """Returns the members that the store has let go and that are not among `touched`."""
        store = dict(pyro.get_param_store().named_parameters())
        kept = {id(p) for p in store.values()} | {id(m.param) for m in touched}
        return [m for m in self._members.values() if m.named and id(m.param) not in kept]

    def part(self, member: Member, state: State) -> None:
        """Lets `member` go; its state waits for its return while the tensor lives and its name is not taken over."""
        param = member.param
        self._sorted = None
        del self._members[id(param)]
        if pyro.get_param_store().param_name(param) is None:
            key = id(param)
            parted = self._parted
            self._parted[key] = (weakref.ref(param, lambda _: parted.pop(key, None) and None), copied(state))

    def returned(self, param: Tensor) -> State | None:
        """Returns the state with which `param` once left, if it did."""
        found = self._parted.pop(id(param), None)
        return found[1] if found is not None and found[0]() is param else None

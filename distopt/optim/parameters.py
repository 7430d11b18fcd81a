"""Which parameters the optimizer knows, by which names, and the state of those that are not here (yet, or any more)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import pyro
from torch import Tensor

from distopt.optim.groups import ParamRecord
from distopt.optim.packing import same
from distopt.optim.state import State, copied


class _Sorted(NamedTuple):
    """All records, sorted by name, as columns: each is compared or filtered in one loop of the interpreter."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    ids: tuple[int, ...]
    records: tuple[ParamRecord, ...]

    @classmethod
    def of(cls, records: Iterable[ParamRecord]) -> _Sorted:
        by_name = tuple(sorted(records, key=attrgetter("name")))
        tensors = tuple(record.param for record in by_name)
        return cls(tuple(record.name for record in by_name), tensors, tuple(map(id, tensors)), by_name)


class ParamRegistry:
    """The parameters that an optimizer has seen, by identity.

    A parameter is a tensor, not a name: one that is replaced in Pyro's store by another of its name has ended, and the
    new one begins without state. A parameter that leaves the store leaves the registry. Should it come back (as with
    `ParamStoreDict.scope`), it resumes where it was: its state is kept for as long as anything else keeps the tensor
    alive.

    Attributes:
        waiting: State that was loaded for parameters not seen yet, by name.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, State] = {}
        self._records: dict[int, ParamRecord] = {}
        self._departed: dict[int, tuple[Any, State]] = {}
        self._num_unnamed = 0
        self._sorted: _Sorted | None = None

    def __iter__(self) -> Iterator[ParamRecord]:
        return iter(list(self._records.values()))

    def __len__(self) -> int:
        return len(self._records)

    def get(self, param: Tensor) -> ParamRecord | None:
        """Returns what is known of `param`, None when it was never seen."""
        return self._records.get(id(param))

    def get_all(self, params: Iterable[Tensor]) -> list[ParamRecord | None]:
        """Returns what is known of each of `params`."""
        return list(map(self._records.get, map(id, params)))

    def add(self, record: ParamRecord) -> None:
        """Takes in a new parameter."""
        self._sorted = None
        self._records[id(record.param)] = record

    # -- names ---------------------------------------------------------------------------------------------------------

    def named(self, params: Iterable[Tensor]) -> list[tuple[str, Tensor]]:
        """Returns (name, parameter) for each of `params`, sorted by name, each tensor once.

        Names outlive the parameter store; a tensor that it never knew gets one here.

        Raises:
            ValueError: Two tensors have one name.
        """
        store = pyro.get_param_store()
        stored = {id(p): name for name, p in store.named_parameters()}
        named: dict[str, Tensor] = {}
        for p in params:
            name = stored.get(id(p)) or store.param_name(p) or self._kept_name(p)
            if named.setdefault(name, p) is not p:
                raise ValueError(
                    f"two parameters are called {name!r}: one of shape {tuple(named[name].shape)} and one of shape "
                    f"{tuple(p.shape)}. Was it replaced in the parameter store while an old trace still holds it?"
                )
        return sorted(named.items(), key=itemgetter(0))

    def _kept_name(self, param: Tensor) -> str:
        record = self.get(param)
        if record is not None:
            return record.name
        self._num_unnamed += 1
        return f"unnamed {self._num_unnamed}"

    def known(self, params: Sequence[Tensor]) -> list[ParamRecord] | None:
        """Returns the records of `params`, each once, sorted by name.

        None when one of them is new, or when the store does not hold every parameter by its name any more.
        """
        names, tensors, ids, records = self._by_name()
        if not same(tuple(map(pyro.get_param_store()._params.get, names)), tensors):
            return None
        wanted = set(map(id, params))
        chosen = list(compress(records, map(wanted.__contains__, ids)))
        return chosen if len(chosen) == len(wanted) else None

    def is_in_store(self) -> bool:
        """Returns whether the store holds every parameter by its name, and no tensor by two names."""
        store = pyro.get_param_store()._params
        names, tensors, *_ = self._by_name()
        is_held = same(tuple(map(store.get, names)), tensors)
        return is_held and len(set(map(id, store.values()))) == len(store)

    def _by_name(self) -> _Sorted:
        if self._sorted is None:
            self._sorted = _Sorted.of(self._records.values())
        return self._sorted

    def by_state_name(self) -> dict[str, ParamRecord]:
        """Returns each parameter by the name under which its state is saved: the store's present one, if it has any.

        Of two tensors with one name, one of which was replaced in the store, the one that the store holds counts.
        """
        store = pyro.get_param_store()
        records: dict[str, ParamRecord] = {}
        for record in self._records.values():
            name = store.param_name(record.param) or record.name
            is_held = store._params.get(record.name) is record.param
            if is_held or (name not in records and name not in self.waiting):
                records[name] = record
        return records

    def loadable(self) -> Mapping[str, ParamRecord]:
        """Returns by name the parameters that take up loaded state at once: those not replaced in the store."""
        in_store = pyro.get_param_store()._params
        return {r.name: r for r in self._records.values() if in_store.get(r.name, r.param) is r.param}

    # -- parameters that go and come back ------------------------------------------------------------------------------

    def gone(self, touched: Iterable[ParamRecord]) -> list[ParamRecord]:
        """Returns the parameters that were removed from the store and are not among `touched`."""
        store = dict(pyro.get_param_store().named_parameters())
        kept = {id(p) for p in store.values()} | {id(record.param) for record in touched}
        return [record for record in self._records.values() if record.named and id(record.param) not in kept]

    def remove(self, record: ParamRecord, state: State) -> None:
        """Removes a parameter; its state is kept, should it return, while the tensor exists and its name is free."""
        param = record.param
        key = id(param)
        self._sorted = None
        del self._records[key]
        if pyro.get_param_store().param_name(param) is None:
            departed = self._departed
            # An id may be used anew once the tensor is gone, so the entry must go with the tensor.
            departed[key] = (weakref.ref(param, lambda _: departed.pop(key, None) and None), copied(state))

    def forget(self, record: ParamRecord) -> None:
        """Removes a parameter; should it be stepped again, it begins anew."""
        self._sorted = None
        del self._records[id(record.param)]

    def returned(self, param: Tensor) -> State | None:
        """Returns the state with which `param` once left, if it did."""
        entry = self._departed.pop(id(param), None)
        return entry[1] if entry is not None and entry[0]() is param else None

"""Copies, pickles and files of optimizers that have stepped."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from distopt.optim.grouping import Grouping
from distopt.optim.groups import ParamRecord
from distopt.optim.packed_state import PackedState
from distopt.optim.parameters import ParamRegistry
from distopt.optim.state import State, copied
from distopt.optim.step_plan import Planner


class Copies:
    """How a `PyroOptim` is copied and written to files.

    It finds its parameters by identity, and those that step together by their memory. Neither survives a copy that
    knows nothing of them, so what is copied are arguments, parameters and their states, of which it begins anew.
    """

    _registry: ParamRegistry
    _groups: Grouping
    _planner: Planner

    @abstractmethod
    def _start(self) -> None:
        """Begins without any parameter."""

    @abstractmethod
    def get_state(self) -> dict[str, State]:
        """Returns the state of all parameters by name."""

    @abstractmethod
    def set_state(self, state_dict: Mapping[str, State]) -> None:
        """Replaces the state of parameters."""

    def set_packed_state(self, packed: PackedState) -> None:
        """Does what `set_state` does with `packed.unpack()`; `packed` may be changed afterwards.

        Raises:
            ValueError: As `set_state`.
        """
        self.set_state(packed.unpack())

    def save(self, filename: str | Path) -> None:
        """Writes `get_state()` to the file `filename`; `pyro.optim` can read it."""
        with open(filename, "wb") as file:
            torch.save(self.get_state(), file)

    def load(self, filename: str | Path, map_location: Any = None) -> None:
        """Reads what `save` wrote, here or in `pyro.optim`, and hands it to `set_state`.

        Args:
            filename: The file; only tensors, numbers, strings and containers of them are read, no code is run.
            map_location: As in `torch.load`.
        """
        with open(filename, "rb") as file:
            self.set_state(torch.load(file, map_location=map_location, weights_only=True))

    _INTERNAL: ClassVar[frozenset[str]] = frozenset({"_registry", "_groups", "_planner"})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns an optimizer of copied parameters, with copied state, as `pyro.optim` does.

        The parameters are those that are copied along: `model, optim = copy.deepcopy((model, optim))` goes on with
        both. To the parameters of the original it is a new optimizer, which has not seen them.
        """
        self._planner.settle()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        settings = {key: value for key, value in vars(self).items() if key not in self._INTERNAL}
        twin.__dict__.update(copy.deepcopy(settings, memo))
        twin._start()
        twin._registry.waiting.update(copied(self._registry.waiting))

        assignments = []
        for group in self._groups:
            for m, state in zip(group.members, group.states(), strict=True):
                param = copy.deepcopy(m.param, memo)
                record = ParamRecord(param, m.name, copy.deepcopy(m.args, memo), m.clip, m.key, m.alone, m.named)
                twin._registry.add(record)
                assignments.append((record, state))
        twin._groups.assign(assignments)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled: the arguments, and the state of all parameters by name."""
        settings = {key: value for key, value in vars(self).items() if key not in self._INTERNAL}
        return {"settings": settings, "state": copied(self.get_state())}  # views of one copy would each take it whole

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Takes up the arguments; state waits for the parameter of its name."""
        self.__dict__.update(pickled["settings"])
        self._start()
        self.set_state(pickled["state"])

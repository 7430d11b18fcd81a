"""The live state of a run: what is captured from Pyro's store, optimizers and modules, and how it is put back.

Tensors stay the objects they are wherever shape and dtype allow: optimizers and modules keep holding them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from pyro.optim.optim import PyroOptim
from torch import nn

import distopt.optim
from distopt.backends.base import Backend
from distopt.checkpoint.columns import columns_of, tabulate
from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.checkpoint.module_state import RegisteredModules, apply_modules, capture_modules, check_modules
from distopt.checkpoint.param_store import apply_params, capture_params, check_names
from distopt.checkpoint.sharded_params import capture_local
from distopt.optim import DistributedOptimizer, PackedState
from distopt.optim.settings import Settings, revise, settings_of
from distopt.optim.state import copied
from distopt.rng import capture_rng_state
from distopt.sharding import local_parameters

logger = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state of tensors and plain values: an amp scaler, a sampler, error feedback."""

    def state_dict(self) -> Any:
        """Returns the state; tensors may be the live ones."""

    def load_state_dict(self, state: Any) -> Any:
        """Takes up a state that `state_dict` returned."""


class RunState:
    """The objects whose state a checkpoint holds, sorted by how that is captured and restored.

    This is the only place that asks what an object is; everything after it works on the sorted mappings.

    Args:
        state: By name: optimizers, modules, and other objects with a state that is equal on all ranks.
        per_rank: By name: objects with a state that differs between ranks.

    Raises:
        TypeError: An object has no state, or is a class where an object of it is expected.
        ValueError: A name is in both.
    """

    def __init__(self, state: Mapping[str, Any], per_rank: Mapping[str, Any]) -> None:
        self.optimizers: dict[str, PyroOptim] = {}
        self.modules: dict[str, nn.Module] = {}
        self.objects: dict[str, Stateful] = {}
        self.per_rank: dict[str, Stateful] = {}

        _check_names("state", state)
        _check_names("per_rank", per_rank)
        twice = sorted(state.keys() & per_rank.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)}: in state and in per_rank; give each object in one of them")
        for name, value in state.items():
            if isinstance(value, PyroOptim):
                self.optimizers[name] = value
            elif isinstance(value, nn.Module):
                self.modules[name] = value
            else:
                self.objects[name] = _checked(value, f"state[{name!r}]", "a PyroOptim, an nn.Module or an object")
        for name, value in per_rank.items():
            self.per_rank[name] = _checked(value, f"per_rank[{name!r}]", "an object")

        self._registered = RegisteredModules(self.modules)

        # What lossy compression of gradients has not sent yet differs between ranks, and belongs to the optimizer.
        self.compression: dict[str, Stateful] = {
            name: optimizer.rank_local_state
            for name, optimizer in self.optimizers.items()
            if isinstance(optimizer, DistributedOptimizer) and optimizer.rank_local_state is not None
        }

    def all_modules(self) -> dict[str, nn.Module]:
        """Returns the modules that were given, and those with buffers that the model has registered with Pyro."""
        return self.modules | self._registered.find()

    def capture(self, backend: Backend) -> dict[str, Any]:
        """Returns this rank's state as nested dicts, lists and tensors; tensors may be the live ones.

        Args:
            backend: Tells the rank, and whose generators are saved.

        Returns:
            By kind: `rank` differs between ranks; `buffers` usually does not, so ranks write those that differ from
            rank 0's; `shard` is of this rank's datapoints, if there are any; `replicated` is equal on all ranks, and
            rank 0's alone.

        Raises:
            CheckpointError: Something cannot be described, such as an unknown constraint.
        """
        local = local_parameters()
        outside, buffers, names = capture_modules(self.all_modules())
        captured: dict[str, Any] = {
            "rank": {
                "rng": capture_rng_state(backend.device),
                "optimizers": {name: each.state_dict() for name, each in self.compression.items()},
                "objects": {name: each.state_dict() for name, each in self.per_rank.items()},
            },
            "buffers": buffers,
        }
        if not local and backend.rank != 0:
            return captured

        # Local parameters go to this rank's shard, by row; all others are equal on all ranks, so rank 0's are enough.
        optimizers = {name: capture_optimizer(optimizer) for name, optimizer in self.optimizers.items()}
        if local:
            states = {name: packed.select(local.__contains__).unpack() for name, packed in optimizers.items()}
            params = capture_params(skip=lambda name: name not in local)
            captured["shard"] = capture_local(params, states, local)
            optimizers = {name: packed.select(lambda name: name not in local) for name, packed in optimizers.items()}
        if backend.rank == 0:
            tables: list[dict[str, Any]] = []
            captured["replicated"] = {
                "params": tabulate(capture_params(skip=local.__contains__), tables),
                "tables": tables,
                "optimizers": {name: columns_of(packed) for name, packed in optimizers.items()},
                "modules": outside,
                "module_params": names,
                "objects": {name: each.state_dict() for name, each in self.objects.items()},
                "settings": {name: self._settings(name, optimizers[name].names()) for name in optimizers},
            }
        return captured

    def _settings(self, name: str, params: Iterable[str]) -> Settings:
        return settings_of(_wrapped(self.optimizers[name]), params)

    def revise_optimizers(
        self, replicated: Mapping[str, Any], step: int, *, restarts: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns saved states of optimizers as this run's optimizers are asked for, and what changed.

        Args:
            replicated: As for `apply`; `settings` are those of the optimizers that were saved.
            step: Steps of their schedules, for parameters whose state has none.
            restarts: Whether schedules start anew.

        Raises:
            CheckpointError: An optimizer is of another class than the one that was saved.
        """
        states = dict(_renamed(replicated["optimizers"], self.optimizers))
        settings = _renamed(replicated.get("settings", {}), self.optimizers)
        changes: list[str] = []
        for name in self.optimizers.keys() & states.keys() & settings.keys():
            optimizer, saved = _wrapped(self.optimizers[name]), settings[name]
            now = self._settings(name, ())["optimizer"]
            if now != saved["optimizer"]:
                raise CheckpointError(
                    f"the checkpoint has the state of {saved['optimizer']}, and the optimizer here is {now}. Use "
                    f"{saved['optimizer']} (optim.name), or restore parameters alone: "
                    "checkpoint.resume_only=[params], in a script restore(only=['params'])."
                )
            states[name], lines = revise(states[name], saved, optimizer, step=step, restarts=restarts)
            changes += lines
        return states, changes

    def apply(
        self,
        replicated: Mapping[str, Any],
        buffers: Mapping[str, Any],
        rank_local: Mapping[str, Any] | None,
        only: Collection[str] | None = None,
    ) -> None:
        """Puts the objects and Pyro's store into a saved state; tensors may become theirs.

        Args:
            replicated: Parameters and state of optimizers by parameter, of this rank's datapoints too; modules;
                objects.
            buffers: Of the modules.
            rank_local: Of this rank; None if its ranks were not those of today.
            only: What is taken, `params` and `optimizer`; None takes all. Parameters include all of the modules.

        Raises:
            CheckpointError: An object does not accept its state; those before it have been restored.
        """
        # Parameters come first: state of an optimizer is taken up by the parameters that are in the store.
        if only is None or "params" in only:
            modules = self.all_modules()
            if only is None:
                check_names(replicated["params"], self.optimizers.values())
                check_modules(replicated, buffers, modules)
            apply_params(replicated["params"], modules, replicated["module_params"], self.optimizers.values())
            apply_modules(replicated["modules"], modules)
            apply_modules(buffers, modules)
        if only is None or "optimizer" in only:
            apply_optimizers(replicated["optimizers"], self.optimizers)
        if only is not None:
            return
        apply_objects(replicated["objects"], self.objects)
        if rank_local is not None:
            apply_objects(_renamed(rank_local["optimizers"], self.compression), self.compression)
            apply_objects(rank_local["objects"], self.per_rank)


def _wrapped(optimizer: PyroOptim) -> PyroOptim:
    return optimizer.optim if isinstance(optimizer, DistributedOptimizer) else optimizer


def _check_names(argument: str, named: object) -> None:
    """Refuses what is no mapping of names: a name that is no string would come back from a checkpoint as one."""
    if not isinstance(named, Mapping):
        raise TypeError(
            f"{argument} is a {type(named).__name__}; expected a mapping such as {{'optimizer': optimizer}}"
        )
    for name in named:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument} has the name {name!r}; expected a string")


def _checked(value: Any, where: str, expected: str) -> Stateful:
    """Returns `value` if it has a state; a class has the methods of its objects, but no state."""
    if isinstance(value, type) or not isinstance(value, Stateful):
        kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{where} is {kind}; expected {expected} with state_dict() and load_state_dict()")
    return value


def capture_optimizer(optimizer: PyroOptim) -> PackedState:
    """Returns the optimizer's state, including loaded state that still waits for its parameter.

    Raises:
        CheckpointError: Pyro's optimizer has lost the names of its parameters.
    """
    if isinstance(optimizer, distopt.optim.PyroOptim | DistributedOptimizer):
        return optimizer.packed_state()
    states = dict(optimizer._state_waiting_to_be_consumed)
    states.update(optimizer.get_state())
    if None in states:
        raise CheckpointError(
            "the optimizer holds state of parameters that are no longer in Pyro's store (was it cleared?); make a new "
            "optimizer after pyro.clear_param_store()."
        )
    return PackedState.from_states(states)


def apply_optimizers(saved: Mapping[str, Any], optimizers: Mapping[str, PyroOptim]) -> None:
    """Replaces the state of the optimizers, see `_renamed` for whose.

    Args:
        saved: By name of the optimizer, state dicts by parameter name.
        optimizers: The run's optimizers by name.
    """
    saved = _renamed(saved, optimizers)
    for name in saved.keys() & optimizers.keys():
        optimizer = optimizers[name]
        if isinstance(optimizer, distopt.optim.PyroOptim | DistributedOptimizer):
            optimizer.set_state(saved[name])
            continue

        # pyro.optim ignores new state for parameters that it has stepped already, so its objects are dropped first. It
        # keeps the tensors that it is given, and these are views of columns: each would keep its whole column alive.
        optimizer.optim_objs.clear()
        optimizer.grad_clip.clear()
        optimizer._state_waiting_to_be_consumed.clear()
        optimizer.set_state(copied(saved[name]))
    _warn_of_differences(saved, optimizers)


def apply_objects(saved: Mapping[str, Any], objects: Mapping[str, Stateful]) -> None:
    """Loads each saved state into the object of its name.

    Raises:
        CorruptCheckpointError: An object does not accept the state.
    """
    for name in saved.keys() & objects.keys():
        try:
            objects[name].load_state_dict(saved[name])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"{name} does not accept the saved state: {error!r}.") from error
    _warn_of_differences(saved, objects)


def _renamed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the saved state of optimizers under today's names.

    The only optimizer of a checkpoint belongs to the only one of the run, whatever they are called: the name is the
    script's choice, and imported files and format 3 have none.
    """
    if len(saved) == 1 and len(current) == 1:
        return dict(zip(current, saved.values(), strict=True))
    return saved


def _warn_of_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Says in the log which state is not used, and which objects do not continue from a state."""
    unused = sorted(saved.keys() - current.keys())
    if unused:
        logger.warning(
            "ignoring state of %s in the checkpoint: no such object was passed to Checkpointer", ", ".join(unused)
        )
    fresh = sorted(current.keys() - saved.keys())
    if fresh:
        logger.warning("the checkpoint has no state of %s, which starts from scratch", ", ".join(fresh))

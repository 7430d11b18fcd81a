"""The live state of a run: what is captured from Pyro's store, optimizers and modules, and how it is put back.

Tensors stay the objects they are wherever shape and dtype allow: optimizers and modules keep holding them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import normalize_param_name
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

import distopt.optim
from distopt.backends.base import Backend
from distopt.checkpoint.columns import columns_of, tabulate
from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.checkpoint.sharded_params import capture_local
from distopt.constraints import ConstraintError, build_constraint, describe_constraint
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

        # What lossy compression of gradients has not sent yet differs between ranks, and belongs to the optimizer.
        self.compression: dict[str, Stateful] = {
            name: optimizer.rank_local_state
            for name, optimizer in self.optimizers.items()
            if isinstance(optimizer, DistributedOptimizer) and optimizer.rank_local_state is not None
        }

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
        outside, buffers, names = capture_modules(self.modules)
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
            apply_params(replicated["params"], self.modules)
            apply_modules(replicated["modules"], self.modules)
            apply_modules(buffers, self.modules)
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


def described(constraint: Constraint, where: str) -> dict[str, Any]:
    """Returns the description of a constraint.

    Raises:
        CheckpointError: For a class that is not known, naming the parameter.
    """
    try:
        return describe_constraint(constraint)
    except ConstraintError as error:
        raise CheckpointError(f"{where}: {error}") from error


def built(description: Any, where: str) -> Constraint:
    """Returns the constraint that `described` has described.

    Raises:
        CorruptCheckpointError: For anything that `described` does not write.
    """
    try:
        return build_constraint(description)
    except ConstraintError as error:
        raise CorruptCheckpointError(f"{where}: {error}") from error


def capture_params(skip: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
    """Returns each parameter of Pyro's store by name: its unconstrained value and its constraint, described.

    Args:
        skip: Returns whether the parameter of a name is left out.
    """
    store = pyro.get_param_store()
    constraints = store.get_state()["constraints"]
    captured: dict[str, Any] = {}
    for name, value in store.named_parameters():
        if skip(name):
            continue
        captured[name] = {"value": value.detach()}
        if type(constraints[name]) is not type(torch.distributions.constraints.real):
            captured[name]["constraint"] = described(constraints[name], f"params/{name}")
        if not value.requires_grad:
            captured[name]["frozen"] = True
    return captured


def apply_params(saved: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Makes Pyro's store hold exactly the saved parameters.

    A parameter that is there with the same shape, dtype and device takes the value in place. One that a module of
    `modules` registers is written into the module's own tensor. One that came later than the checkpoint is removed.

    Args:
        saved: What `capture_params` returned; tensors may end up in the store.
        modules: The run's modules by name.
    """
    # Pyro's store knows a parameter by its unconstrained tensor, and so do optimizers and modules. There are three
    # cases: the store has the tensor; a module has it, and would register it at its first call; or neither has it yet.
    store = pyro.get_param_store()
    homes = _module_parameters(modules)
    live = dict(store.named_parameters())
    for name in live.keys() - saved.keys():
        del store[name]

    values: dict[str, Tensor] = {}
    constraints: dict[str, Constraint] = {}
    for name, entry in saved.items():
        value = entry["value"]
        constraints[name] = (
            built(entry["constraint"], f"params/{name}")
            if "constraint" in entry
            else torch.distributions.constraints.real
        )

        # Optimizers and modules hold the live tensor, so the saved numbers go into it wherever they fit.
        target = live.get(name, homes.get(normalize_param_name(name)))
        if target is not None and target.shape == value.shape and target.dtype == value.dtype:
            with torch.no_grad():
                target.copy_(value)
        else:
            target = value.detach().requires_grad_(not entry.get("frozen", False))
        if name in live and target is not live[name]:
            del store[name]
        values[name] = target
    store.set_state({"params": values, "constraints": constraints})


def _module_parameters(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns the modules' parameters under the names `pyro.module` and PyroModule register them by, with dots only."""
    by_name: dict[str, Tensor] = {}
    for key, module in modules.items():
        for prefix in (key, getattr(module, "_pyro_name", key)):
            for name, parameter in module.named_parameters():
                by_name[f"{prefix}.{name.removesuffix('_unconstrained')}".lstrip(".")] = parameter
    return by_name


def capture_modules(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Splits the modules' `state_dict`s in three, each by module and key.

    Returns:
        The parameters that are not in Pyro's store; buffers and extra state, apart since batch statistics differ
        between ranks; and of each parameter in the store its name there.
    """
    # A parameter that is in Pyro's store is saved there. Its name in the store cannot be told from its name in the
    # module (`pyro.module("line", net)`, `PyroModule`, autoguides each make another), so it is found by identity.
    stored = {id(value): name for name, value in pyro.get_param_store().named_parameters()}
    outside: dict[str, Any] = {}
    buffers: dict[str, Any] = {}
    names: dict[str, Any] = {}
    for prefix, module in modules.items():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        state = module.state_dict(keep_vars=True)
        outside[prefix] = {
            name: value for name, value in state.items() if name in parameters and id(parameters[name]) not in stored
        }
        buffers[prefix] = {name: value for name, value in state.items() if name not in parameters}
        names[prefix] = {
            name: stored[id(value)] for name, value in parameters.items() if name in state and id(value) in stored
        }
    return outside, buffers, names


def apply_modules(saved: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Loads what `capture_modules` returned (one of its first two results) into the modules.

    Raises:
        CheckpointError: A module is not given, or has not the tensors that were saved.
    """
    for prefix, state in saved.items():
        if prefix not in modules:
            raise CheckpointError(
                f"the checkpoint has a module {prefix!r}; pass it to Checkpointer in state, which has {[*modules]}."
            )
        try:
            unexpected = modules[prefix].load_state_dict(state, strict=False).unexpected_keys
        except RuntimeError as error:
            raise CheckpointError(f"module {prefix!r}: {error}") from error
        if unexpected:
            raise CheckpointError(
                f"module {prefix!r} has no {', '.join(unexpected)}, which the checkpoint has. Is it another model, or "
                "does it create them on first use? Then call it once before restoring."
            )


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

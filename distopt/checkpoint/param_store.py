"""Pyro's parameters in checkpoints: what the store holds, and how saved values reach the tensors of the run.

The store knows a parameter by its unconstrained tensor, and so do optimizers and modules. A resumed run must compute
with the tensors that are restored, step them, and keep as one what is one tensor under several names. There are four
cases for a saved name:

- the store has it: the saved numbers go into that tensor;
- a module of the run has it: they go into the module's tensor, which the store then holds;
- neither has it yet: the store gets a new tensor. When a module then registers its own under that name, Pyro would
  leave the module as it is, and the run would compute with one tensor and step another. So `Adoption` watches the first
  call of `pyro.param` for each such name, and makes the module's tensor the parameter, with the saved numbers;
- the run has it under another name, that of a compiled or wrapped module: its state is renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.optim.optim import PyroOptim
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn
from torch.distributions.constraints import Constraint, real

import distopt.optim
from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.constraints import ConstraintError, build_constraint, describe_constraint
from distopt.optim import DistributedOptimizer

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put between a module's name and those of its parameters."""


def canonical(name: str) -> str:
    """Returns what is equal for all names of one parameter, whatever wraps its module.

    Example:
        >>> canonical("net$$$_orig_mod.weight"), canonical("net.weight_unconstrained")
        ('net.weight', 'net.weight')
    """
    steps = name.replace("$$$", ".").removesuffix("_unconstrained").split(".")
    return ".".join(step for step in steps if step and step not in _WRAPPERS)


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

    One whose tensor has an earlier name in the store has that as `tied`.

    Args:
        skip: Returns whether the parameter of a name is left out.
    """
    store = pyro.get_param_store()
    constraints = store.get_state()["constraints"]
    captured: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, value in store.named_parameters():
        if skip(name):
            continue
        captured[name] = {"value": value.detach()}
        if type(constraints[name]) is not type(real):
            captured[name]["constraint"] = described(constraints[name], f"params/{name}")
        if not value.requires_grad:
            captured[name]["frozen"] = True
        if first.setdefault(id(value), name) != name:
            captured[name]["tied"] = first[id(value)]
    return captured


# Restoring.


def with_names_of_today(replicated: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the saved state with the names that its parameters have in today's store, which may wrap modules.

    Args:
        replicated: `params`, `optimizers` and `module_params`, see `load_replicated`.
    """
    saved = replicated["params"]
    live = pyro.get_param_store().keys()
    today = {canonical(name): name for name in live if name not in saved}
    names = {name: today[canonical(name)] for name in saved if name not in live and canonical(name) in today}
    if not names:
        return dict(replicated)

    def renamed(by_name: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in by_name.items()}

    params = renamed(saved)
    for name, entry in params.items():
        if "tied" in entry:
            params[name] = entry | {"tied": names.get(entry["tied"], entry["tied"])}
    optimizers = {name: renamed(states) for name, states in replicated["optimizers"].items()}
    module_params = {
        key: {path: names.get(name, name) for path, name in each.items()}
        for key, each in replicated["module_params"].items()
    }
    return {**replicated, "params": params, "optimizers": optimizers, "module_params": module_params}


def check_names(saved: Mapping[str, Any], optimizers: Iterable[PyroOptim]) -> None:
    """Refuses a checkpoint of another model: each side has parameters that the other lacks, and these were not stepped.

    A run that goes back to an older step may have parameters that came later; it has stepped them. A new process may
    lack parameters that appear in later steps. Only both together mean that a parameter has another name.

    Raises:
        CheckpointError: With the names.
    """
    live = pyro.get_param_store().keys()
    surplus = sorted(saved.keys() - live)
    fresh = sorted(live - saved.keys())
    if not surplus or not fresh:
        return
    stepped = {name for optimizer in optimizers for name in _names_with_state(optimizer)}
    fresh = [name for name in fresh if name not in stepped]
    if fresh:
        raise CheckpointError(
            f"the checkpoint has parameters that this run lacks ({', '.join(surplus[:5])}), and this run has ones that "
            f"the checkpoint lacks ({', '.join(fresh[:5])}): is it another model? Give parameters the names that they "
            "had. If new ones are to start from their first values, restore before the model runs for the first time."
        )


def _names_with_state(optimizer: PyroOptim) -> Iterable[str]:
    if isinstance(optimizer, distopt.optim.PyroOptim | DistributedOptimizer):
        return optimizer.packed_state().names()
    names: Iterable[str] = optimizer.get_state().keys()
    return names


def apply_params(
    saved: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    module_params: Mapping[str, Mapping[str, str]] | None = None,
    optimizers: Iterable[PyroOptim] = (),
) -> None:
    """Makes Pyro's store hold exactly the saved parameters.

    Args:
        saved: What `capture_params` returned; tensors may end up in the store.
        modules: The run's modules by name.
        module_params: By module of the run that was saved, the names in the store of its parameters.
        optimizers: Of the run; state that waits for a parameter is renamed with it.

    Raises:
        CheckpointError: Names are tied there and not here, or the other way round; a value does not fit into a module.
            Nothing has been changed then.
    """
    store = pyro.get_param_store()
    live = dict(store.named_parameters())
    homes = live | {
        name: tensor for name, tensor in _module_homes(saved, modules, module_params or {}).items() if name not in live
    }
    _check_ties(saved, homes)
    _check_shapes(saved, {name: tensor for name, tensor in homes.items() if name not in live})

    values: dict[str, Tensor] = {}
    constraints: dict[str, Constraint] = {}
    group_homes = {entry.get("tied", name): homes[name] for name, entry in saved.items() if name in homes}
    for name, entry in saved.items():
        value = entry["value"]
        group = entry.get("tied", name)
        constraints[name] = built(entry["constraint"], f"params/{name}") if "constraint" in entry else real
        if group in values:  # the same tensor under another name
            values[name] = values[group]
            continue
        target = group_homes.get(group)
        if target is None or target.shape != value.shape or target.dtype != value.dtype:
            target = value.detach().requires_grad_(not entry.get("frozen", False))
        else:
            with torch.no_grad():
                target.copy_(value)
        values[name] = target

    for name in [name for name, tensor in live.items() if values.get(name) is not tensor]:
        _remove(store, name)
    store.set_state({"params": values, "constraints": constraints})
    Adoption.begin(store, [name for name in saved if name not in live], list(optimizers))


def _module_homes(
    saved: Mapping[str, Any], modules: Mapping[str, nn.Module], module_params: Mapping[str, Mapping[str, str]]
) -> dict[str, Tensor]:
    """Returns the modules' tensors by saved name: as recorded when it was saved, else by the names Pyro would give."""
    by_name: dict[str, Tensor] = {}
    for key, module in modules.items():
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for prefix in (key, getattr(module, "_pyro_name", key)):
            by_name |= {canonical(f"{prefix}.{name}"): parameter for name, parameter in parameters.items()}
    homes = {name: by_name[canonical(name)] for name in saved if canonical(name) in by_name}

    for key, stored in module_params.items():
        if key in modules:
            parameters = {canonical(name): each for name, each in modules[key].named_parameters(remove_duplicate=False)}
            homes |= {
                name: parameters[canonical(path)] for path, name in stored.items() if canonical(path) in parameters
            }
    return homes


def _check_ties(saved: Mapping[str, Any], homes: Mapping[str, Tensor]) -> None:
    """Refuses a checkpoint in which other names are one tensor than here."""
    first: dict[str, str] = {}  # by name of the group there, a name of it here
    groups: dict[int, str] = {}
    for name in filter(homes.__contains__, saved):
        group = saved[name].get("tied", name)
        other = first.setdefault(group, name)
        if homes[other] is not homes[name]:
            raise CheckpointError(
                f"{other!r} and {name!r} are one tensor in the checkpoint and two here; tie them before restoring: let "
                "both modules have the same nn.Parameter."
            )
        before = groups.setdefault(id(homes[name]), group)
        if before != group and not torch.equal(saved[before]["value"], saved[group]["value"]):
            raise CheckpointError(
                f"{before!r} and {group!r} are one tensor here and two with different values in the checkpoint; give "
                "each a tensor before restoring."
            )


def _check_shapes(saved: Mapping[str, Any], homes: Mapping[str, Tensor]) -> None:
    for name, home in homes.items():
        if name in saved and home.shape != saved[name]["value"].shape:
            raise CheckpointError(
                f"parameter {name!r} has shape {tuple(saved[name]['value'].shape)} in the checkpoint and "
                f"{tuple(home.shape)} in the module of this run: is it another model?"
            )


def _remove(store: ParamStoreDict, name: str) -> None:
    """Removes a name from the store; its tensor stays under the other names that it has."""
    value = store._params.pop(name)
    store._constraints.pop(name, None)
    store._param_to_name.pop(value, None)
    others = [other for other, tensor in store._params.items() if tensor is value]
    if others:
        store._param_to_name[value] = others[-1]


class Adoption:
    """Makes the tensors that modules register after a restore the restored parameters.

    It stands in front of the store's `setdefault`, which every `pyro.param` with a first value calls, until each name
    that it waits for has come once.

    Args:
        store: Pyro's parameter store.
        names: Those restored into tensors that no one but the store and modules given to the checkpointer has.
        optimizers: State that waits for a parameter is renamed with it.
    """

    def __init__(self, store: ParamStoreDict, names: Iterable[str], optimizers: list[PyroOptim]) -> None:
        self._store = store
        self._optimizers = optimizers
        self._waiting = {canonical(name): name for name in names}

    @classmethod
    def begin(cls, store: ParamStoreDict, names: Iterable[str], optimizers: list[PyroOptim]) -> None:
        """Replaces the adoption of a restore before."""
        vars(store).pop("setdefault", None)
        adoption = cls(store, names, optimizers)
        if adoption._waiting:
            vars(store)["setdefault"] = adoption.setdefault

    def setdefault(self, name: str, init_constrained_value: Any, constraint: Constraint = real) -> Tensor:
        """Does what the store's method does, after adopting the tensor where it is a module's."""
        saved_name = self._waiting.pop(canonical(name), "")
        if saved_name and name in self._store:
            saved_name = name
        if not self._waiting:
            vars(self._store).pop("setdefault", None)
        if saved_name in self._store and isinstance(init_constrained_value, nn.Parameter):
            self._adopt(saved_name, name, init_constrained_value)
        value: Tensor = ParamStoreDict.setdefault(self._store, name, init_constrained_value, constraint)
        return value

    def _adopt(self, saved_name: str, name: str, parameter: nn.Parameter) -> None:
        store = self._store
        value = store._params[saved_name]
        names = [other for other, tensor in store._params.items() if tensor is value]
        if value is not parameter:
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"parameter {name!r} has shape {tuple(value.shape)} in the checkpoint that was restored and "
                    f"{tuple(parameter.shape)} in its module: is it another model?"
                )
            if isinstance(value, nn.Parameter):
                raise CheckpointError(
                    f"{' and '.join(map(repr, names))} are one tensor in the checkpoint that was restored, and "
                    f"{name!r} is another one here; tie them: let both modules have the same nn.Parameter."
                )
            with torch.no_grad():
                parameter.copy_(value)
        constraint = store._constraints[saved_name]
        store._param_to_name.pop(value, None)
        if name != saved_name:
            _remove(store, saved_name)
            names = [name if other == saved_name else other for other in names]
            for optimizer in self._optimizers:
                _rename_waiting(optimizer, saved_name, name)
        store._constraints[name] = constraint
        store.set_state({"params": dict.fromkeys(names, parameter), "constraints": {}})


def _rename_waiting(optimizer: PyroOptim, before: str, now: str) -> None:
    """Renames the state that an optimizer has loaded for a parameter that it has not seen."""
    optimizer = optimizer.optim if isinstance(optimizer, DistributedOptimizer) else optimizer
    is_ours = isinstance(optimizer, distopt.optim.PyroOptim)
    waiting = optimizer._registry.waiting if is_ours else optimizer._state_waiting_to_be_consumed
    if before in waiting:
        waiting[now] = waiting.pop(before)

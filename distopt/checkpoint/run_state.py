"""The live state of a run: what is captured from Pyro's store, the optimizer and modules, and how it is put back.

Tensors stay the objects they are wherever shape and dtype allow: optimizers and modules go on holding them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.params.param_store import normalize_param_name
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.constraints import ConstraintError, build_constraint, describe_constraint


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state of tensors and plain values: an amp scaler, a sampler, error feedback."""

    def state_dict(self) -> Any:
        """Returns the state; tensors may be the live ones."""

    def load_state_dict(self, state: Any) -> Any:
        """Takes up a state that `state_dict` returned."""


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
    """Returns each parameter of Pyro's store by name: its unconstrained value and its constraint, described."""
    store = pyro.get_param_store()
    constraints = store.get_state()["constraints"]
    captured = {}
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
    """
    store = pyro.get_param_store()
    homes = _module_parameters(modules)
    live = dict(store.named_parameters())
    for name in live.keys() - saved.keys():
        del store[name]
    values, constraints = {}, {}
    for name, entry in saved.items():
        value = entry["value"]
        constraints[name] = (
            built(entry["constraint"], f"params/{name}")
            if "constraint" in entry
            else torch.distributions.constraints.real
        )
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
    found: dict[str, Tensor] = {}
    for key, module in modules.items():
        for prefix in (key, getattr(module, "_pyro_name", key)):
            for name, parameter in module.named_parameters():
                found[f"{prefix}.{name.removesuffix('_unconstrained')}".lstrip(".")] = parameter
    return found


def capture_modules(modules: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns three parts of the modules' `state_dict`s, by module and key.

    These are: the parameters that are not in Pyro's store; buffers and extra state, apart since batch statistics differ
    between ranks; and of each parameter in the store its name there.
    """
    stored = {id(value): name for name, value in pyro.get_param_store().named_parameters()}
    outside, buffers, names = {}, {}, {}
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
    """Loads what `capture_modules` returned (either of the first two parts) into the modules.

    Raises:
        CheckpointError: when a module is not given, or has not the tensors that were saved.
    """
    for prefix, state in saved.items():
        if prefix not in modules:
            raise CheckpointError(
                f"the checkpoint has a module {prefix!r}; give it in modules, there are {[*modules]}."
            )
        try:
            unexpected = modules[prefix].load_state_dict(state, strict=False).unexpected_keys
        except RuntimeError as error:
            raise CheckpointError(f"module {prefix!r}: {error}") from error
        if unexpected:
            raise CheckpointError(
                f"module {prefix!r} has no {', '.join(unexpected)}, which the checkpoint has. Is it another model, or "
                "does it make them on first use? Then call it once before restoring."
            )


def capture_optimizer(optimizer: PyroOptim) -> dict[str, Any]:
    """Returns the optimizer's state by parameter name, that of parameters not seen since it was loaded included."""
    state = dict(getattr(optimizer, "_state_waiting_to_be_consumed", {}))
    state.update(optimizer.get_state())
    if None in state:
        raise CheckpointError(
            "the optimizer holds state of parameters that are no longer in Pyro's store (was it cleared?); make a new "
            "optimizer after pyro.clear_param_store()."
        )
    return state


def apply_optimizer(state: Mapping[str, Any], optimizer: PyroOptim) -> None:
    """Gives the optimizer that state, instead of what it has.

    pyro.optim ignores new state for parameters that it has stepped already, so there its objects are dropped first.
    """
    if type(optimizer).__module__.startswith("pyro."):
        optimizer.optim_objs.clear()
        optimizer.grad_clip.clear()
        optimizer._state_waiting_to_be_consumed.clear()
    optimizer.set_state(dict(state))


def apply_extras(saved: Mapping[str, Any], extras: Mapping[str, Stateful]) -> list[str]:
    """Loads each saved extra into the object of its name; returns the names of those that are not given.

    Raises:
        CorruptCheckpointError: when an object does not accept the state.
    """
    for name in saved.keys() & extras.keys():
        try:
            extras[name].load_state_dict(saved[name])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"extras/{name} does not take the saved state: {error!r}.") from error
    return sorted(saved.keys() - extras.keys())

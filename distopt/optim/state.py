"""State of one parameter as `pyro.optim` writes it, and what two parameters must share to be stepped as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distopt.optim.construction import load_plain_state, plain_state

State: TypeAlias = dict[str, Any]
"""A torch state dict of one parameter, or `{"scheduler": ..., "optimizer": ...}` of two."""

SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""Per-parameter state that is one number whatever the shape of the parameter."""


# Torch optimizers and schedulers, and the state dicts that they read and write.


def is_scheduler(optimizer: Any) -> bool:
    """Returns whether `optimizer` is a learning-rate scheduler (it wraps an optimizer) and not an optimizer.

    Example:
        >>> sgd = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> is_scheduler(sgd), is_scheduler(torch.optim.lr_scheduler.ConstantLR(sgd))
        (False, True)
    """
    return hasattr(optimizer, "optimizer")


def optimizer_of(handle: Any) -> torch.optim.Optimizer:
    """Returns the torch optimizer behind `handle`, which is one or a scheduler of one."""
    return handle.optimizer if is_scheduler(handle) else handle  # type: ignore[no-any-return]


def state_dict_of(handle: Any) -> State:
    """Returns the state dict of an optimizer, or of a scheduler and its optimizer."""
    if is_scheduler(handle):
        return {"scheduler": handle.state_dict(), "optimizer": plain_state(handle.optimizer)}
    return plain_state(handle)


def load_into(handle: Any, state: State) -> None:
    """Loads what `state_dict_of` returned; the optimizer last, so that its learning rates stand."""
    if is_scheduler(handle):
        handle.load_state_dict(copied(state["scheduler"]))
        load_plain_state(handle.optimizer, state["optimizer"])
    else:
        load_plain_state(handle, state)


def optimizer_state(state: State) -> State:
    """Returns the optimizer's state dict within a parameter's state."""
    return state["optimizer"] if "optimizer" in state else state


def with_optimizer_state(state: State, optimizer: State) -> State:
    """Returns one parameter's state: its optimizer's, and a copy of the schedule in `state` where that has one."""
    return {"scheduler": copied(state["scheduler"]), "optimizer": optimizer} if "scheduler" in state else optimizer


def state_of_one(group: dict[str, Any], values: dict[str, Any]) -> State:
    """Returns the state dict of one parameter from its hyper-parameters and what torch keeps for it."""
    return {"state": {0: values} if values else {}, "param_groups": [group | {"params": [0]}]}


def copied(value: Any, *, tensors: bool = True) -> Any:
    """Returns a copy of nested state that shares no tensor with it, or (without `tensors`) the same tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone() if tensors else value
    if isinstance(value, dict):
        return {k: copied(v, tensors=tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(v, tensors=tensors) for v in value) if type(value) in (list, tuple) else value
    return value


# What must be equal for parameters to be stepped together. Keys are built of values, not of identities, so that two
# parameters whose states were loaded from a file meet again in one group.


def frozen(value: Any) -> Any:
    """Returns a hashable stand-in for `value`, equal for equal numbers, strings and containers of them."""
    if isinstance(value, Tensor):
        return ("tensor", value.item()) if value.numel() == 1 else ("tensor", id(value))
    if isinstance(value, Mapping):
        return tuple(sorted((str(k), frozen(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in value)
    try:
        hash(value)
    except TypeError:
        return ("object", id(value))
    return (type(value).__name__, value)


def hyper_key(group: Mapping[str, Any]) -> Any:
    """Returns a hashable stand-in for the hyper-parameters of a torch parameter group.

    `fused` and `foreach` choose a kernel and change no result, so groups may differ in them.
    """
    return tuple((k, frozen(v)) for k, v in sorted(group.items()) if k not in ("params", "fused", "foreach"))


def packing_key(state: State | None, numel: int, *, staggered: bool = False) -> Any:
    """Returns what must be equal for two parameters' states to be packed: all of the state that is not elementwise.

    Args:
        state: Of one parameter; None for one not stepped yet.
        numel: Elements of the parameter.
        staggered: Whether step counts, and a rate that decays with them, may differ (see `staggered`).

    Returns:
        None when the state cannot be packed at all, being neither elementwise nor one number.
    """
    if state is None:
        return "new"

    optimizer = optimizer_state(state)
    hyper = optimizer["param_groups"][0]
    staggered = staggered and not hyper.get("lr_decay")  # that of Adagrad may be loaded or set, whatever the arguments
    scalars = []
    for key, value in optimizer["state"].get(0, {}).items():
        if isinstance(value, Tensor) and key not in SCALARS:
            if value.numel() != numel or value.layout is not torch.strided:
                return None
            scalars.append((key, str(value.dtype)))
        elif not (staggered and key == "step"):
            scalars.append((key, frozen(value)))
    if staggered and hyper.get("lrd", 1.0) != 1.0:
        hyper = {key: value for key, value in hyper.items() if key != "lr"}
    return (tuple(scalars), hyper_key(hyper), frozen(state.get("scheduler")))


# State dicts of several parameters, for one torch optimizer.


def flat_state(states: Sequence[State]) -> State:
    """Returns one state dict for parameters that lie packed in one tensor.

    Args:
        states: Of one parameter each, with equal packing keys, in the order in which the parameters are packed. Where
            their step counts differ, the largest is that of the result.
    """
    optimizers = [optimizer_state(s) for s in states]
    each = [optimizer["state"].get(0, {}) for optimizer in optimizers]
    oldest = max(range(len(each)), key=lambda i: float(each[i].get("step", 0)))
    values = {
        key: torch.cat([s[key].reshape(-1) for s in each])
        if isinstance(value, Tensor) and key not in SCALARS
        else copied(value)
        for key, value in each[oldest].items()
    }
    return with_optimizer_state(states[oldest], state_of_one(optimizers[oldest]["param_groups"][0], values))


def list_state(states: Sequence[State], *, separate: bool) -> State:
    """Returns one state dict for a list of parameters.

    Args:
        states: Of one parameter each, with equal schedules.
        separate: Whether each has a separate parameter group, so that their hyper-parameters may differ.
    """
    optimizers = [optimizer_state(s) for s in states]
    values = {i: copied(o["state"][0]) for i, o in enumerate(optimizers) if o["state"].get(0)}
    if separate:
        groups = [dict(o["param_groups"][0]) | {"params": [i]} for i, o in enumerate(optimizers)]
    else:
        groups = [dict(optimizers[0]["param_groups"][0]) | {"params": list(range(len(states)))}]
    return with_optimizer_state(states[0], {"state": values, "param_groups": groups})


# Checks of state dicts before they are loaded: whose they are, and of what shape. Torch's own `load_state_dict` takes
# anything that has as many parameters, and a wrong one shows steps later, as numbers.

_ALWAYS_KNOWN = frozenset(
    {
        "params",
        "initial_lr",
        "swa_lr",
        "max_lr",
        "min_lr",
        "max_momentum",
        "base_momentum",
        "initial_momentum",
        "param_names",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
    }
)
"""Keys that schedulers write into a parameter group, or that another version of torch has."""


def check_state_dict(state_dict: Any) -> None:
    """Raises unless `state_dict` maps parameter names to state dicts of one parameter each."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"set_state: found {type(state_dict).__name__}, expected {{parameter name: torch state dict}}.")
    for name, state in state_dict.items():
        _check_entry(name, state)


def _check_entry(name: Any, state: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(
            f"set_state: found the name {name!r}, expected a string. A file that pyro.optim wrote after the "
            "parameter store was cleared has lost its names; save it before clearing."
        )
    optimizer = state.get("optimizer", state) if isinstance(state, Mapping) else None
    if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= set(optimizer):
        raise ValueError(
            f"set_state: the state of {name!r} is no torch state dict, expected the keys 'state' and "
            "'param_groups' (or 'scheduler' and 'optimizer')."
        )
    if ("optimizer" in state) != ("scheduler" in state):
        raise ValueError(f"set_state: the state of {name!r} has only one of 'scheduler' and 'optimizer'.")
    groups = optimizer["param_groups"]
    if len(groups) != 1 or len(groups[0].get("params", ())) != 1:
        raise ValueError(f"set_state: the state of {name!r} is of several parameters, expected that of one.")


def check_state(
    name: str, state: Mapping[str, Any], param: Tensor, hyper: set[str], scheduled: bool, optimizer: str, shaped: bool
) -> None:
    """Raises ValueError unless `state` may be that of `param`.

    Args:
        name: Of the parameter.
        state: One parameter's state, as `check_state_dict` accepts it.
        param: The parameter.
        hyper: The hyper-parameters that its optimizer has.
        scheduled: Whether its optimizer is behind a scheduler.
        optimizer: The optimizer's name, for the message.
        shaped: Whether its state is of the parameter's shape.
    """
    if scheduled != ("scheduler" in state):
        written, wanted = ("no scheduler", "one") if scheduled else ("a scheduler", "none")
        raise ValueError(
            f"state of {name!r}: it has {written}, this optimizer has {wanted}. Load it into the kind that wrote it."
        )

    saved = optimizer_state(dict(state))
    if unknown := sorted(set(saved["param_groups"][0]) - hyper - _ALWAYS_KNOWN):
        raise ValueError(
            f"state of {name!r}: it was written by another optimizer, it has {', '.join(unknown)}, which {optimizer} "
            f"has not. Load it into the optimizer that wrote it, or start without it."
        )
    if not shaped:
        return

    values: Mapping[str, Any] = next(iter(saved["state"].values()), {})
    for key, value in values.items():
        if isinstance(value, Tensor) and key not in SCALARS and value.shape != param.shape:
            raise ValueError(
                f"state of {name!r}: {key} has shape {tuple(value.shape)}, the parameter has {tuple(param.shape)}. "
                "Was the model changed since it was saved?"
            )

"""Checks of state dicts before they are loaded: whose they are, and of what shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distopt.optim.state import SCALARS, optimizer_part

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


def check_state_dict(state_dict: Any) -> None:
    """Raises unless `state_dict` maps parameter names to state dicts of one parameter each."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"set_state: found {type(state_dict).__name__}, expected {{parameter name: torch state dict}}.")
    for name, state in state_dict.items():
        if not isinstance(name, str):
            raise ValueError(
                f"set_state: found the name {name!r}, expected a string. A file that pyro.optim wrote after the "
                "parameter store was cleared has lost its names; save it before clearing."
            )
        part = state.get("optimizer", state) if isinstance(state, Mapping) else None
        if not isinstance(part, Mapping) or not {"state", "param_groups"} <= set(part):
            raise ValueError(
                f"set_state: the state of {name!r} is no torch state dict, expected the keys 'state' and "
                "'param_groups' (or 'scheduler' and 'optimizer')."
            )
        if ("optimizer" in state) != ("scheduler" in state):
            raise ValueError(f"set_state: the state of {name!r} has only one of 'scheduler' and 'optimizer'.")
        groups = part["param_groups"]
        if len(groups) != 1 or len(groups[0].get("params", ())) != 1:
            raise ValueError(f"set_state: the state of {name!r} is of several parameters, expected one by itself.")


def check_state(
    name: str, state: Mapping[str, Any], param: Tensor, hyper: set[str], scheduled: bool, optimizer: str, shaped: bool
) -> None:
    """Raises ValueError unless `state` may be that of `param`.

    Args:
        name: of the parameter.
        state: one parameter's state, as `check_state_dict` accepts it.
        param: the parameter.
        hyper: the hyper-parameters that its optimizer has.
        scheduled: whether its optimizer is behind a scheduler.
        optimizer: the optimizer's name, for the message.
        shaped: whether its state is of the parameter's shape.
    """
    if scheduled != ("scheduler" in state):
        found, wanted = ("no scheduler", "one") if scheduled else ("a scheduler", "none")
        raise ValueError(
            f"state of {name!r}: it has {found}, this optimizer has {wanted}. Load it into the kind that wrote it."
        )
    part = optimizer_part(dict(state))
    if strange := sorted(set(part["param_groups"][0]) - hyper - _ALWAYS_KNOWN):
        raise ValueError(
            f"state of {name!r}: it was written by another optimizer, it has {', '.join(strange)}, which {optimizer} "
            f"has not. Load it into the optimizer that wrote it, or start without it."
        )
    if not shaped:
        return
    values: Mapping[str, Any] = next(iter(part["state"].values()), {})
    for key, value in values.items():
        if isinstance(value, Tensor) and key not in SCALARS and value.shape != param.shape:
            raise ValueError(
                f"state of {name!r}: {key} has shape {tuple(value.shape)}, the parameter has {tuple(param.shape)}. "
                "Was the model changed since it was saved?"
            )

"""Checkpoints of format 3, which distopt wrote before optimizer state was saved in columns, read as those of today.

Format 3 differs in names (`noise` was the state of the random number generators, `extras` the objects with a state) and
in the optimizer's state. That was a state dict for each parameter, with equal `param_groups` replaced by the number of
one of them, and flattened into one dict where torch's two levels say nothing, so that it fits into a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from distopt.checkpoint.columns import untabulate
from distopt.checkpoint.errors import CorruptCheckpointError

OPTIMIZER = "optimizer"
"""The name that the optimizer of a checkpoint of format 3 has today; it had none."""

_GROUPS = "param_groups"
_COMPRESSION = "compression"


def upgrade_replicated(state: Any) -> dict[str, Any]:
    """Returns the state that is equal on all ranks, with the optimizer's as state dicts by parameter.

    Raises:
        CorruptCheckpointError: The state is not that of a run.
    """
    keys = {"params", "optimizer", "tables", "modules", "module_params", "extras"}
    if not isinstance(state, dict) or state.keys() != keys:
        raise CorruptCheckpointError("the replicated state is not that of a run.")
    optimizer = state["optimizer"]
    return {
        "params": untabulate(state["params"], state["tables"]),
        "optimizers": {} if optimizer is None else {OPTIMIZER: _states(optimizer, state["tables"])},
        "modules": state["modules"],
        "module_params": state["module_params"],
        "objects": state["extras"],
    }


def upgrade_rank(state: Any) -> dict[str, Any]:
    """Returns the state of one rank; errors of compressed gradients were an object among the user's."""
    try:
        objects = dict(state["extras"])
        # A user's object may have had this name, too, where the optimizer had no such state.
        compression = objects.get(_COMPRESSION)
        if isinstance(compression, dict) and compression.keys() == {"errors", "starts"}:
            del objects[_COMPRESSION]
            return {"rng": state["noise"], "optimizers": {OPTIMIZER: compression}, "objects": objects}
        return {"rng": state["noise"], "optimizers": {}, "objects": objects}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"the state of a rank is malformed: {error!r}.") from error


def upgrade_shard(params: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the local parameters of one rank; the optimizer's state of each was None without an optimizer."""
    upgraded: dict[str, dict[str, Any]] = {}
    for name, entry in params.items():
        kept = {key: value for key, value in entry.items() if key != "optimizer"}
        optimizers = {} if entry["optimizer"] is None else {OPTIMIZER: entry["optimizer"]}
        upgraded[name] = kept | {"optimizers": optimizers}
    return upgraded


def _states(shared: Mapping[str, Any], tables: Any) -> dict[str, Any]:
    """Returns the state dict of each parameter."""

    # Three shapes occur: `{"scheduler", "optimizer"}`, either with the optimizer's dict or with its content flattened;
    # `{"state", "param_groups": number}`; and `{tensors…, "param_groups": number}`, the state of one tensor flattened.
    def unfold(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        if "scheduler" in state:
            inner = state["optimizer"] if "optimizer" in state else {k: v for k, v in state.items() if k != "scheduler"}
            return {"scheduler": state["scheduler"], "optimizer": unfold(inner)}
        if type(state.get(_GROUPS)) is not int:
            return state

        groups = deepcopy(shared["groups"][state[_GROUPS]])
        if "state" in state:
            return state | {_GROUPS: groups}
        return {"state": {0: {key: value for key, value in state.items() if key != _GROUPS}}, _GROUPS: groups}

    try:
        return {name: unfold(state) for name, state in untabulate(shared["states"], tables).items()}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"optimizer state is malformed: {error!r}.") from error

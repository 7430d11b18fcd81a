"""Optimizer state of many parameters without repeating what they share.

PyroOptim speaks of each parameter by itself, so a thousand of them have a thousand equal `param_groups`: most of the
text of a checkpoint, and half the time of a save.
"""

from __future__ import annotations

import marshal
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from distopt.checkpoint.errors import CorruptCheckpointError


def share_groups(states: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `own_groups` takes: the states with a number in the place of each `param_groups` of plain values.

    Example:
        >>> shared = share_groups({name: {"state": {}, "param_groups": [{"lr": 0.1}]} for name in "ab"})
        >>> shared["groups"], shared["states"]["b"]
        ([[{'lr': 0.1}]], {'state': {}, 'param_groups': 0})
    """
    groups: list[Any] = []
    numbers: dict[bytes, int] = {}

    def share(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        if "optimizer" in state:  # of a scheduler
            return state | {"optimizer": share(state["optimizer"])}
        try:
            key = marshal.dumps(state["param_groups"])  # the quickest key that tells 1 from 1.0 and True
        except (KeyError, ValueError):  # tensors among them
            return state
        number = numbers.setdefault(key, len(groups))
        if number == len(groups):
            groups.append(state["param_groups"])
        if state.keys() == {"state", "param_groups"} and [*state["state"]] == [0]:  # a torch optimizer of one tensor
            return {"only": state["state"][0], "param_groups": number}
        return state | {"param_groups": number}

    return {"states": {name: share(state) for name, state in states.items()}, "groups": groups}


def own_groups(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the states that `share_groups` was given.

    Raises:
        CorruptCheckpointError: when it has not made this.
    """

    def own(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        if "optimizer" in state:
            return state | {"optimizer": own(state["optimizer"])}
        if type(state.get("param_groups")) is not int:
            return state
        groups = deepcopy(shared["groups"][state["param_groups"]])
        if "only" in state:
            return {"state": {0: state["only"]}, "param_groups": groups}
        return state | {"param_groups": groups}

    try:
        return {name: own(state) for name, state in shared["states"].items()}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"optimizer state is malformed: {error!r}.") from error

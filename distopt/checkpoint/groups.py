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
from distopt.checkpoint.tables import tabulate, untabulate

_GROUPS = "param_groups"


def share_groups(states: Mapping[str, Any], tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what `own_groups` takes: the states in tables, with numbers in the place of equal `param_groups`.

    Example:
        >>> tables = []
        >>> share_groups({name: {"state": {}, "param_groups": [{"lr": 0.1}]} for name in "ab"}, tables)
        {'states': {'a': 0, 'b': 0}, 'groups': [[{'lr': 0.1}]]}
        >>> tables[0]["alike"]
        {'state': {}, 'param_groups': 0}
    """
    groups: list[Any] = []
    numbers: dict[bytes, int] = {}

    def share(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        if state.keys() == {"scheduler", "optimizer"}:
            inner = share(state["optimizer"])
            flat = isinstance(inner, dict) and not inner.keys() & {"state", "scheduler"} and _GROUPS in inner
            return {"scheduler": state["scheduler"]} | (inner if flat else {"optimizer": inner})
        try:
            key = marshal.dumps(state[_GROUPS])
        except (KeyError, ValueError):  # tensors among them
            return state
        number = numbers.setdefault(key, len(groups))
        if number == len(groups):
            groups.append(state[_GROUPS])
        of_params = state["state"]
        if len(state) == 2 and len(of_params) == 1 and 0 in of_params:  # a torch optimizer of one tensor
            only = of_params[0]
            if type(only) is dict and not only.keys() & {"state", "scheduler", "optimizer", _GROUPS}:
                return only | {_GROUPS: number}
        return state | {_GROUPS: number}

    return {"states": tabulate({name: share(state) for name, state in states.items()}, tables), "groups": groups}


def own_groups(shared: Mapping[str, Any], tables: Any) -> dict[str, Any]:
    """Returns the states that `share_groups` was given.

    Raises:
        CorruptCheckpointError: when it has not made this.
    """

    def own(state: Any) -> Any:
        if not isinstance(state, dict):
            return state
        if "scheduler" in state:
            inner = state["optimizer"] if "optimizer" in state else {k: v for k, v in state.items() if k != "scheduler"}
            return {"scheduler": state["scheduler"], "optimizer": own(inner)}
        if type(state.get(_GROUPS)) is not int:
            return state
        groups = deepcopy(shared["groups"][state[_GROUPS]])
        if "state" in state:
            return state | {_GROUPS: groups}
        return {"state": {0: {key: value for key, value in state.items() if key != _GROUPS}}, _GROUPS: groups}

    try:
        return {name: own(state) for name, state in untabulate(shared["states"], tables).items()}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"optimizer state is malformed: {error!r}.") from error

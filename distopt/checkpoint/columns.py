"""State of many small parameters in columns: a thousand dicts of the same keys cost as much as a few lists.

What they share is written once, and tensors of one shape are then gathered and described together.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeAlias

from torch import Tensor, nn

from distopt.checkpoint.errors import CorruptCheckpointError

# Optimizer state of many parameters without repeating what they share.
#
# PyroOptim speaks of each parameter by itself, so a thousand of them have a thousand equal `param_groups`: most of
# the text of a checkpoint, and half the time of a save.


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


_SMALL_NUMEL = 4096  # larger tensors keep a name of their own in the file
_TENSORS = frozenset({Tensor, nn.Parameter})
_Kind: TypeAlias = tuple[tuple[str, ...], bytes]
"""What the rows of one table have in common: their keys, and their plain values as `marshal` writes them."""


def tabulate(rows: Mapping[str, Any], tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rows with a number in the place of each small one, which is the table that holds it as its next.

    Args:
        rows: by name; dicts of tensors and plain values go to tables, all else stays as it is.
        tables: to which new ones are added.

    Example:
        >>> import torch
        >>> tables = []
        >>> tabulate({name: {"value": torch.zeros(2), "frozen": True} for name in "ab"}, tables)
        {'a': 0, 'b': 0}
        >>> tables[0]["alike"], len(tables[0]["columns"]["value"])
        ({'frozen': True}, 2)
    """
    numbers: dict[_Kind, int] = {}
    placed: dict[str, Any] = {}
    for name, row in rows.items():
        number = _place(row, tables, numbers) if type(row) is dict else None
        placed[name] = row if number is None else number
    return placed


def _place(row: dict[str, Any], tables: list[dict[str, Any]], numbers: dict[_Kind, int]) -> int | None:
    """Adds the row to the table of its kind and returns that one's number; None for a row that stands alone."""
    alike = {}
    for key, value in row.items():
        if type(value) not in _TENSORS:
            alike[key] = value
        elif value.numel() > _SMALL_NUMEL:
            return None
    try:
        kind = (tuple(row), marshal.dumps(alike))  # the quickest key that tells 1 from 1.0 and True
    except ValueError:  # tensors within
        return None
    number = numbers.get(kind)
    if number is None:
        number = numbers[kind] = len(tables)
        columns: dict[str, list[Tensor]] = {key: [] for key in row if key not in alike}
        tables.append({"keys": [*row], "alike": alike, "columns": columns})
    for key, column in tables[number]["columns"].items():
        column.append(row[key])
    return number


def untabulate(placed: Any, tables: Any) -> dict[str, Any]:
    """Returns the rows that `tabulate` was given.

    Raises:
        CorruptCheckpointError: when it has not made these.
    """
    taken: dict[int, dict[str, Iterator[Any]]] = {}
    rows: dict[str, Any] = {}
    try:
        for name, row in placed.items():
            if type(row) is int:
                table = tables[row]
                if row not in taken:
                    taken[row] = {key: iter(column) for key, column in table["columns"].items()}
                own, alike = taken[row], table["alike"]
                row = {key: next(own[key]) if key in own else deepcopy(alike[key]) for key in table["keys"]}
            rows[name] = row
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError) as error:
        raise CorruptCheckpointError(f"a table of state is malformed: {error!r}.") from error
    if any(next(column, None) is not None for own in taken.values() for column in own.values()):
        raise CorruptCheckpointError("a table of state has more values than rows.")
    return rows

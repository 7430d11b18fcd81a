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

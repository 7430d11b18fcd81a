"""State of many small parameters in columns: a thousand dicts with the same keys cost as much as a few lists.

What many parameters share is written once, and what differs lies side by side. The optimizer hands out its state like
that already (`PackedState`), in the very tensors that it steps; here it only becomes plain dicts and lists. Parameters
come one by one from Pyro's store, so here they are sorted into tables.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeAlias

from torch import Tensor, nn

from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.optim import PackedState, StateColumns

# Optimizer state.


def columns_of(packed: PackedState) -> dict[str, Any]:
    """Returns optimizer state as nested dicts and lists, for a checkpoint; no tensor is copied.

    Args:
        packed: Of one optimizer.

    Returns:
        `alone`: state dicts by parameter name, of those that share nothing (their tensors are then named after the
        parameter in the file); `columns`: of each group its `names`, `shapes` ("3,4"), what they share, and columns.
    """
    alone = dict(packed.alone)
    columns: list[dict[str, Any]] = []
    for each in packed.columns:
        if len(each.names) == 1:
            (alone[each.names[0]],) = each.states()
            continue

        # Text costs a fraction of a list of numbers each, and most parameters of a group have few shapes.
        texts = {shape: ",".join(map(str, shape)) for shape in set(each.shapes)}
        columns.append(
            {
                "names": [*each.names],
                "shapes": [texts[shape] for shape in each.shapes],
                "shared": each.shared,
                "columns": each.columns,
            }
        )
    return {"alone": alone, "columns": columns}


def states_of(saved: Any) -> dict[str, Any]:
    """Returns the state dict of each parameter by name, from what `columns_of` returned.

    Tensors are views of the columns.

    Raises:
        CorruptCheckpointError: It is something else.
    """
    try:
        # StateColumns cuts its tensors where the shapes say, and raises where these do not add up to them.
        columns = tuple(
            StateColumns(tuple(each["names"]), _shapes(each["shapes"]), each["shared"], each["columns"])
            for each in saved["columns"]
        )
        return PackedState(columns, saved["alone"]).unpack()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"optimizer state is malformed: {error!r}.") from error


def _shapes(texts: list[str]) -> tuple[tuple[int, ...], ...]:
    shapes = {text: tuple(map(int, text.split(","))) if text else () for text in set(texts)}
    return tuple(shapes[text] for text in texts)


# Parameters.


_SMALL_NUMEL = 4096  # larger tensors keep their own name in the file
_TENSORS = frozenset({Tensor, nn.Parameter})
_Kind: TypeAlias = tuple[tuple[str, ...], bytes]
"""What the rows of one table have in common: their keys, and their plain values as `marshal` writes them."""


def tabulate(rows: Mapping[str, Any], tables: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rows with each small one replaced by a number: that of the table that holds it.

    The rows of a table are in the order of their names here, so the table needs no names.

    Args:
        rows: By name; dicts of tensors and plain values go to tables, all else stays as it is.
        tables: To which new ones are added.

    Example:
        >>> import torch
        >>> tables = []
        >>> tabulate({name: {"value": torch.zeros(2), "frozen": True} for name in "ab"}, tables)
        {'a': 0, 'b': 0}
        >>> tables[0]["alike"], len(tables[0]["columns"]["value"])
        ({'frozen': True}, 2)
    """
    numbers: dict[_Kind, int] = {}
    entries: dict[str, Any] = {}
    for name, row in rows.items():
        number = _table_of(row, tables, numbers) if type(row) is dict else None
        entries[name] = row if number is None else number
    return entries


def _table_of(row: dict[str, Any], tables: list[dict[str, Any]], numbers: dict[_Kind, int]) -> int | None:
    """Adds the row to the table of its kind and returns the table's number; None for a row that stands alone."""
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


def untabulate(entries: Any, tables: Any) -> dict[str, Any]:
    """Returns the rows that `tabulate` was given.

    Args:
        entries: What it returned.
        tables: The tables that it added to.

    Raises:
        CorruptCheckpointError: They are something else, or do not belong together.
    """
    opened: dict[int, dict[str, Iterator[Any]]] = {}
    rows: dict[str, Any] = {}
    try:
        for name, row in entries.items():
            if type(row) is int:
                table = tables[row]
                if row not in opened:
                    opened[row] = {key: iter(column) for key, column in table["columns"].items()}
                columns = opened[row]
                alike = table["alike"]
                row = {key: next(columns[key]) if key in columns else deepcopy(alike[key]) for key in table["keys"]}
            rows[name] = row
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError) as error:
        raise CorruptCheckpointError(f"a table of state is malformed: {error!r}.") from error
    if any(next(column, None) is not None for columns in opened.values() for column in columns.values()):
        raise CorruptCheckpointError("a table of state has more values than rows.")
    return rows

"""Parameters of which each rank holds some rows: saved with their global indices, read by whoever holds them next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.statefile import RowReader, StateReader
from distopt.checkpoint.storage import Storage

_BY_ROW = "distopt:by_row"
_MOST_READS = 64
"""More stretches of rows than this are read as one, with what lies between them."""


@dataclass(frozen=True)
class Shard:
    """Which rows of a parameter this rank holds."""

    rows: NDArray[np.int64]
    """(n,) their global indices; each row belongs to one rank."""
    num_rows: int
    """Of all ranks together."""
    dim: int = 0
    """The dimension of the unconstrained tensor that runs over the rows; of size n."""


Sharding: TypeAlias = Callable[[str], Shard | None]
"""Parameter name → its shard on this rank, as it is now; None for a replicated parameter."""


def shard_name(rank: int) -> str:
    """Returns the name of the state that holds one rank's rows."""
    return f"shard-{rank:05d}"


def split_shards(params: dict[str, Any], optimizer: dict[str, Any] | None, sharding: Sharding | None) -> dict[str, Any]:
    """Takes the sharded parameters out of what was captured, with their optimizer state; returns them to be saved.

    Raises:
        CheckpointError: when a parameter has not as many rows as its shard says.
    """
    shards: dict[str, Any] = {}
    for name in list(params):
        shard = sharding(name) if sharding is not None else None
        if shard is None:
            continue
        entry = params.pop(name)
        shape = entry["value"].shape
        if len(shard.rows) != shape[shard.dim]:
            raise CheckpointError(
                f"params/{name} has shape {tuple(shape)}, its shard {len(shard.rows)} rows in dimension {shard.dim}."
            )
        state = (optimizer or {}).pop(name, None)
        entry["value"] = _rows_first(entry["value"], shard.dim)
        shards[name] = entry | {
            "rows": torch.from_numpy(np.ascontiguousarray(shard.rows, dtype=np.int64)),
            "num_rows": shard.num_rows,
            "dim": shard.dim,
            "optimizer": _mark_rows(state, shape, shard.dim),
        }
    return shards


def read_shards(
    storage: Storage, folder: str, manifest: Manifest, sharding: Sharding | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (parameters, optimizer states) by name, with the rows that this rank holds now.

    Reads the rows it needs, and no others, from whichever ranks' files have them.

    Raises:
        CheckpointError: when a row that is needed was not saved, or nothing says which rows are needed.
    """
    readers = [
        StateReader(storage, folder, manifest, shard_name(rank))
        for rank in range(manifest.world_size)
        if f"{shard_name(rank)}.json.gz" in manifest.files
    ]
    saved = [reader.visit(lambda note, rows: rows) for reader in readers]
    params, states = {}, {}
    try:
        for name in sorted({name for part in saved for name in part}):
            shard = sharding(name) if sharding is not None else None
            if shard is None:
                raise CheckpointError(
                    f"{storage.root}/{folder}: {name!r} was saved in shards. Give Checkpointer(sharded=…) a function "
                    "that says which of its rows this rank holds."
                )
            parts = [part[name] for part in saved if name in part]
            params[name], state = _assemble(name, parts, shard)
            if state is not None:
                states[name] = state
    finally:
        for reader in readers:
            reader.close()
    return params, states


def _assemble(name: str, parts: list[Any], shard: Shard) -> tuple[dict[str, Any], Any]:
    sources = [(part, part["rows"].read(0, part["rows"].num_rows).numpy()) for part in parts]
    wanted = np.asarray(shard.rows, dtype=np.int64)
    found = np.isin(wanted, np.concatenate([rows for _, rows in sources]))
    if not found.all():
        raise CheckpointError(
            f"{name!r}: row {int(wanted[~found][0])} is wanted here and was not saved (of {parts[0]['num_rows']})."
        )

    def gather(pick: Callable[[Any], RowReader]) -> Tensor:
        return _rows_back(_gather_rows([(pick(part), rows) for part, rows in sources], wanted), shard.dim)

    # What is not by row, such as the number of steps, is that of the rank that had the first of the rows.
    first = next((part for part, rows in sources if len(wanted) and wanted[0] in rows), parts[0])
    kept = {key: value for key, value in first.items() if key in ("constraint", "frozen")}
    param = _read_all(kept) | {"value": gather(lambda part: part["value"])}
    return param, _fill(first["optimizer"], [part["optimizer"] for part, _ in sources], sources, wanted, shard.dim)


def _fill(template: Any, others: list[Any], sources: list[Any], wanted: NDArray[np.int64], dim: int) -> Any:
    """Returns the optimizer state with its rows gathered from all ranks and the rest as in `template`."""
    if isinstance(template, RowReader):
        return template.read_all()
    if isinstance(template, dict) and template.keys() == {_BY_ROW}:
        readers = [(other[_BY_ROW], rows) for other, (_, rows) in zip(others, sources, strict=True)]
        return _rows_back(_gather_rows(readers, wanted), dim)
    if isinstance(template, dict):
        return {
            key: _fill(value, [other[key] for other in others], sources, wanted, dim) for key, value in template.items()
        }
    if isinstance(template, (list, tuple)):
        return type(template)(
            _fill(value, [other[index] for other in others], sources, wanted, dim)
            for index, value in enumerate(template)
        )
    return template


def _gather_rows(sources: list[tuple[RowReader, NDArray[np.int64]]], wanted: NDArray[np.int64]) -> Tensor:
    out: Tensor | None = None
    for reader, rows in sources:
        _, here, there = np.intersect1d(wanted, rows, assume_unique=True, return_indices=True)
        if out is None:
            out = torch.empty((len(wanted), *reader.shape[1:]), dtype=reader.dtype)
        order = np.argsort(there)
        for places, start, stop in _stretches(here[order], there[order]):
            block = reader.read(start, stop)
            out[torch.from_numpy(places[0])] = block[torch.from_numpy(places[1] - start)]
    assert out is not None
    return out


def _stretches(
    here: NDArray[np.int64], there: NDArray[np.int64]
) -> Iterator[tuple[tuple[NDArray[np.int64], NDArray[np.int64]], int, int]]:
    """Yields ((places here, places there), first, last + 1) for each run of neighbouring places there."""
    if len(there) == 0:
        return
    cuts = np.flatnonzero(np.diff(there) != 1) + 1
    if len(cuts) > _MOST_READS:
        cuts = cuts[:0]
    for mine, theirs in zip(np.split(here, cuts), np.split(there, cuts), strict=True):
        yield (mine, theirs), int(theirs[0]), int(theirs[-1]) + 1


def _mark_rows(value: Any, shape: torch.Size, dim: int) -> Any:
    """Returns optimizer state in which the tensors of the parameter's own shape are marked as having its rows."""
    if isinstance(value, Tensor):
        return {_BY_ROW: _rows_first(value, dim)} if value.shape == shape else value
    if isinstance(value, Mapping):
        return {key: _mark_rows(item, shape, dim) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mark_rows(item, shape, dim) for item in value)
    return value


def _read_all(value: Any) -> Any:
    if isinstance(value, RowReader):
        return value.read_all()
    if isinstance(value, dict):
        return {key: _read_all(item) for key, item in value.items()}
    return [_read_all(item) for item in value] if isinstance(value, list) else value


def _rows_first(tensor: Tensor, dim: int) -> Tensor:
    return tensor.detach().movedim(dim, 0)


def _rows_back(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(0, dim).contiguous()

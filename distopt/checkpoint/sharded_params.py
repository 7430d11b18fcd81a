"""Local parameters in checkpoints: each rank writes its datapoints' rows, and any other number of ranks reads its own.

A rank's file `shard-00000` holds, for each local parameter, its unconstrained value and its optimizer state with the
datapoints as the first dimension, so that the rows a rank needs are read without the others.

Which datapoint a row is of follows from the plate's global rows where a rank gave them (`sharded_plate(rows=...)`), and
else from the sizes of all ranks' shards: ranks then hold consecutive blocks in order of rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.backends.base import Backend, Json
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.format_3 import upgrade_shard
from distopt.checkpoint.manifest import FORMAT_3, Manifest
from distopt.checkpoint.statefile import RowReader, StateReader
from distopt.checkpoint.storage.base import Storage
from distopt.sharding import LocalParameter, local_parameters

_ROWS = "@rows"
_WHOLE = "@whole"  # what stands for a tensor with, and without, a row per datapoint


def shard_name(rank: int) -> str:
    """Returns the name of the state that one rank has of its datapoints."""
    return f"shard-{rank:05d}"


def plate_sizes() -> dict[str, int]:
    """Returns how many datapoints this rank has of each sharded plate with local parameters."""
    return {entry.plate.name: entry.plate.size for entry in local_parameters().values()}


# Saving.


def capture_local(
    params: Mapping[str, Any], optimizers: Mapping[str, Mapping[str, Any]], local: Mapping[str, LocalParameter]
) -> dict[str, Any]:
    """Returns the local parameters of this rank with their optimizer state, by name and with a row per datapoint.

    Args:
        params: What `capture_params` returned of them.
        optimizers: By name of the optimizer, their state dicts by parameter name.
        local: How the numbers of each belong to its datapoints.
    """
    captured: dict[str, Any] = {}
    for name, entry in local.items():
        shape = params[name]["value"].shape
        captured[name] = params[name] | {
            "plate": entry.plate.name,
            "value": _by_row(params[name]["value"], entry, shape),
            "optimizers": {
                optimizer: _by_row(states[name], entry, shape)
                for optimizer, states in optimizers.items()
                if name in states
            },
        }
    rows = {entry.plate.name: entry.plate.rows for entry in local.values() if entry.plate.rows is not None}
    return {"params": captured, "rows": {plate: torch.from_numpy(index) for plate, index in rows.items()}}


def _by_row(value: Any, entry: LocalParameter, shape: torch.Size) -> Json:
    """Returns nested state with its tensors marked: those in the parameter's shape by row, others whole."""
    if isinstance(value, Tensor):
        if value.shape == shape:
            return {_ROWS: entry.by_row(value)}
        return {_WHOLE: value.reshape(1, -1), "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {key: _by_row(item, entry, shape) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_row(item, entry, shape) for item in value]
    return value


# Restoring.


@dataclass
class LocalState:
    """What one rank has read of its datapoints."""

    params: dict[str, Any] = field(default_factory=dict)
    """As `capture_params` returns them."""
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name of the optimizer, state dicts by parameter name."""
    problem: str = ""
    """What this process lacks to read them; the checkpoint itself is good."""


class ShardedReader:
    """Reads this rank's rows from the shards of a checkpoint, however many ranks wrote it.

    Args:
        backend: Link to the other ranks; constructing is collective.
    """

    def __init__(self, backend: Backend) -> None:
        sizes = backend.all_gather_json(plate_sizes())
        self._entries = local_parameters()
        self._index: dict[str, NDArray[np.int64]] = {}  # by plate, the global index of each datapoint of this rank
        for entry in self._entries.values():
            start = sum(each.get(entry.plate.name, 0) for each in sizes[: backend.rank])
            consecutive = np.arange(start, start + entry.plate.size, dtype=np.int64)
            self._index[entry.plate.name] = consecutive if entry.plate.rows is None else entry.plate.rows

    def read(self, storage: Storage, folder: str, manifest: Manifest) -> LocalState:
        """Returns this rank's rows.

        Raises:
            CheckpointError: The checkpoint lacks some of them.
            CorruptCheckpointError: Naming the file that is not what was written.
        """
        sizes: list[dict[str, int]] = manifest.about.get("plates") or []
        if not any(sizes):
            return LocalState()
        shards = [_Shard(storage, folder, manifest, rank, sizes) for rank, size in enumerate(sizes) if size]
        try:
            return self._collect(shards)
        finally:
            for shard in shards:
                shard.close()

    def _collect(self, shards: Sequence[_Shard]) -> LocalState:
        state = LocalState()
        for name, saved in shards[0].params.items():
            if name not in self._entries:
                return LocalState(
                    problem=f"it has rows of the local parameter {name!r}, and this process does not know which of the "
                    "datapoints are here. Run the model once before restoring: svi.init(...)."
                )
            state.params[name] = {key: saved[key] for key in ("constraint", "frozen") if key in saved}
            values = [shard.params[name]["value"] for shard in shards]
            state.params[name]["value"] = self._assemble(name, values, shards)
            for optimizer in saved["optimizers"]:
                states = [shard.params[name]["optimizers"][optimizer] for shard in shards]
                state.optimizers.setdefault(optimizer, {})[name] = self._assemble(name, states, shards)
        return state

    def _assemble(self, name: str, pieces: Sequence[Any], shards: Sequence[_Shard]) -> Any:
        """Returns nested state of this rank's rows, put together from the same state of each shard."""
        first = pieces[0]
        if isinstance(first, dict) and _ROWS in first:
            return self._rows(name, [piece[_ROWS] for piece in pieces], shards)
        if isinstance(first, dict) and _WHOLE in first:
            return first[_WHOLE].read(0, 1).reshape(first["shape"])
        if isinstance(first, dict):
            return {key: self._assemble(name, [piece[key] for piece in pieces], shards) for key in first}
        if isinstance(first, list):
            return [self._assemble(name, list(items), shards) for items in zip(*pieces, strict=True)]
        return first

    def _rows(self, name: str, readers: Sequence[RowReader], shards: Sequence[_Shard]) -> Tensor:
        """Reads this rank's rows of one tensor, from each shard the span that holds them."""
        entry = self._entries[name]
        wanted = self._index[entry.plate.name]
        order = np.argsort(wanted, kind="stable")
        is_read = np.zeros(len(wanted), bool)
        result: Tensor | None = None
        for reader, shard in zip(readers, shards, strict=True):
            held = shard.index(entry.plate.name)
            positions = np.flatnonzero(np.isin(held, wanted))
            if not len(positions):
                continue

            # One read from the first to the last row that is needed. With consecutive blocks that is nothing more than
            # the rows; with scattered ones it is at most the shard, and still one request.
            span = reader.read(int(positions[0]), int(positions[-1]) + 1)
            if result is None:
                result = span.new_zeros((len(wanted), *span.shape[1:]))
            targets = order[np.searchsorted(wanted[order], held[positions])]
            result[torch.from_numpy(targets)] = span[torch.from_numpy(positions - positions[0])]
            is_read[targets] = True

        if result is None or not is_read.all():
            missing = wanted[~is_read]
            raise CheckpointError(
                f"the checkpoint has no rows {missing[:5].tolist()} of {name!r} (plate {entry.plate.name!r}): "
                f"{len(missing):,} of the {len(wanted):,} datapoints here are not in it. Is it of other data?"
            )
        like = pyro.get_param_store().named_parameters().mapping[name]
        return entry.from_rows(result, like).contiguous().to(like.device)


class _Shard:
    """What one rank wrote of its datapoints, its tensors not yet read."""

    def __init__(
        self, storage: Storage, folder: str, manifest: Manifest, rank: int, sizes: Sequence[Mapping[str, int]]
    ) -> None:
        self._reader = StateReader(storage, folder, manifest, shard_name(rank))
        state = self._reader.visit(lambda note, rows: rows)
        self.params: dict[str, Any] = state["params"]
        if manifest.format == FORMAT_3:
            self.params = upgrade_shard(self.params)
        self._explicit: dict[str, RowReader] = state["rows"]
        self._rank = rank
        self._sizes = sizes
        self._index: dict[str, NDArray[np.int64]] = {}

    def close(self) -> None:
        """Releases the file."""
        self._reader.close()

    def index(self, plate: str) -> NDArray[np.int64]:
        """Returns the global index of each datapoint in this shard, (size,) int64."""
        if plate not in self._index:
            size = self._sizes[self._rank][plate]
            start = sum(each.get(plate, 0) for each in self._sizes[: self._rank])
            explicit = self._explicit.get(plate)
            self._index[plate] = np.arange(start, start + size) if explicit is None else explicit.read(0, size).numpy()
        return self._index[plate]

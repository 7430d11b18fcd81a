"""Local parameters in checkpoints: each rank writes its datapoints' rows, and any other number of ranks reads its own.

A rank's file `shard-00000` holds, for each local parameter, its unconstrained value and its optimizer state with the
datapoints as the first dimension, so that the rows a rank needs are read without the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.optim import PyroOptim
from torch import Tensor

from distopt.backends.base import Backend, Json
from distopt.checkpoint import run_state
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.statefile import RowReader, StateReader
from distopt.checkpoint.storage.base import Storage
from distopt.sharding import LocalParameter, local_parameters

_ROWS, _WHOLE = "@rows", "@whole"  # what stands for a tensor with, and without, a row per datapoint


def shard_name(rank: int) -> str:
    """Returns the name of the state that one rank has of its datapoints."""
    return f"shard-{rank:05d}"


def capture_local(optimizer: PyroOptim | None) -> dict[str, Any]:
    """Returns the local parameters of this rank with their optimizer state, by name; empty when there are none."""
    entries = local_parameters()
    if not entries:
        return {}
    params = run_state.capture_params(skip=lambda name: name not in entries)
    states = {} if optimizer is None else run_state.capture_optimizer(optimizer)
    rows = {entry.plate.name: entry.plate.rows for entry in entries.values() if entry.plate.rows is not None}
    captured = {}
    for name, entry in entries.items():
        shape = params[name]["value"].shape
        captured[name] = params[name] | {
            "plate": entry.plate.name,
            "value": _by_row(params[name]["value"], entry, shape),
            "optimizer": _by_row(states.get(name), entry, shape),
        }
    return {"params": captured, "rows": {name: torch.from_numpy(index) for name, index in rows.items()}}


def plate_sizes() -> dict[str, int]:
    """Returns how many datapoints this rank has of each sharded plate with local parameters."""
    return {entry.plate.name: entry.plate.size for entry in local_parameters().values()}


@dataclass
class LocalState:
    """What one rank has read of its datapoints, as `capture_params` and `PyroOptim.get_state` return it."""

    params: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    """What this process lacks to read them; the checkpoint itself is fine."""


class ShardedReader:
    """Reads this rank's rows from the shards of a checkpoint, however many ranks wrote it.

    Args:
        backend: Link to the other ranks; constructing is collective.
    """

    def __init__(self, backend: Backend) -> None:
        sizes = backend.all_gather_json(plate_sizes())
        self._entries = local_parameters()
        self._device = backend.device
        self._own: dict[str, NDArray[np.int64]] = {}
        for entry in self._entries.values():
            start = sum(each.get(entry.plate.name, 0) for each in sizes[: backend.rank])
            consecutive = np.arange(start, start + entry.plate.size, dtype=np.int64)
            self._own[entry.plate.name] = consecutive if entry.plate.rows is None else entry.plate.rows

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
        for name in shards[0].params:
            if name not in self._entries:
                return LocalState(
                    problem=f"it has rows of the local parameter {name!r}, and this process does not know which of the "
                    "datapoints are here. Run the model once before restoring: svi.init(...)."
                )
            saved = shards[0].params[name]
            state.params[name] = {key: saved[key] for key in ("constraint", "frozen") if key in saved}
            state.params[name]["value"] = self._assemble(
                name, [shard.params[name]["value"] for shard in shards], shards
            )
            states = [shard.params[name]["optimizer"] for shard in shards]
            if states[0] is not None:
                state.optimizer[name] = self._assemble(name, states, shards)
        return state

    def _assemble(self, name: str, parts: Sequence[Any], shards: Sequence[_Shard]) -> Any:
        """Puts nested state together from the same state of each shard."""
        first = parts[0]
        if isinstance(first, dict) and _ROWS in first:
            return self._rows(name, [part[_ROWS] for part in parts], shards)
        if isinstance(first, dict) and _WHOLE in first:
            return first[_WHOLE].read(0, 1).reshape(first["shape"])
        if isinstance(first, dict):
            return {key: self._assemble(name, [part[key] for part in parts], shards) for key in first}
        if isinstance(first, list):
            return [self._assemble(name, list(items), shards) for items in zip(*parts, strict=True)]
        return first

    def _rows(self, name: str, readers: Sequence[RowReader], shards: Sequence[_Shard]) -> Tensor:
        """Reads this rank's rows of one tensor, from each shard the span that holds them."""
        entry = self._entries[name]
        own = self._own[entry.plate.name]
        order = np.argsort(own, kind="stable")
        found = np.zeros(len(own), bool)
        result: Tensor | None = None
        for reader, shard in zip(readers, shards, strict=True):
            held = shard.rows(entry.plate.name)
            places = np.flatnonzero(np.isin(held, own))
            if not len(places):
                continue
            span = reader.read(int(places[0]), int(places[-1]) + 1)
            if result is None:
                result = span.new_zeros((len(own), *span.shape[1:]))
            targets = order[np.searchsorted(own[order], held[places])]
            result[torch.from_numpy(targets)] = span[torch.from_numpy(places - places[0])]
            found[targets] = True
        if result is None or not found.all():
            missing = own[~found]
            raise CheckpointError(
                f"the checkpoint has no rows {missing[:5].tolist()} of {name!r} (plate {entry.plate.name!r}): "
                f"{len(missing):,} of the {len(own):,} datapoints here are not in it. Is it of other data?"
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
        self._explicit: dict[str, RowReader] = state["rows"]
        self._rank, self._sizes = rank, sizes
        self._index: dict[str, NDArray[np.int64]] = {}

    def close(self) -> None:
        """Lets the file go."""
        self._reader.close()

    def rows(self, plate: str) -> NDArray[np.int64]:
        """Returns the global index of each datapoint in this shard."""
        if plate not in self._index:
            size = self._sizes[self._rank][plate]
            start = sum(each.get(plate, 0) for each in self._sizes[: self._rank])
            explicit = self._explicit.get(plate)
            self._index[plate] = np.arange(start, start + size) if explicit is None else explicit.read(0, size).numpy()
        return self._index[plate]


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

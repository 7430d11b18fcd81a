"""Which checkpoint a run goes on from, and what of it each rank reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distopt.backends.base import Backend
from distopt.checkpoint.columns import own_groups, untabulate
from distopt.checkpoint.errors import CheckpointError, ConfigMismatchError, CorruptCheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import Candidate, candidates, check_files, read_manifest, verify
from distopt.checkpoint.sharded_params import LocalState, ShardedReader
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import Storage, is_url, open_storage
from distopt.checkpoint.storage.names import step_of
from distopt.config import MAY_CHANGE, differences
from distopt.launchers import CHECKPOINTS
from distopt.rng import restore_noise, seed_stream

REPLICATED = "replicated"


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a run goes on from."""

    step: int
    progress: Any
    path: str
    world_size: int
    """Ranks that wrote it, which may be more or fewer than now."""


@dataclass(frozen=True)
class Loaded:
    """What one rank has read and checked, and not yet put to use."""

    manifest: Manifest
    replicated: dict[str, Any]
    own: Mapping[str, Any]
    buffers: Mapping[str, Any]
    local: LocalState


def rank_name(rank: int) -> str:
    """Returns the name of the state that one rank alone has."""
    return f"rank-{rank:05d}"


def buffers_name(rank: int) -> str:
    """Returns the name of one rank's module buffers; ranks whose buffers equal rank 0's have none."""
    return f"buffers-{rank:05d}"


def choose(storage: Storage, which: str | int | Path) -> tuple[Storage, list[Candidate]]:
    """Returns where to look and the checkpoints to try, best first; none when there is none and "auto" was asked for.

    Raises:
        CheckpointError: when the step or path that was asked for is not there.
    """
    if which == "auto":
        return storage, candidates(storage)
    if isinstance(which, int):
        found = candidates(storage)
        chosen = [one for one in found if one.step == which]
        if not chosen:
            raise CheckpointError(
                f"{storage.root}: no checkpoint of step {which}; there are {sorted(one.step for one in found)}."
            )
        return storage, chosen[:1]
    return _choose_path(str(which))


def _choose_path(place: str) -> tuple[Storage, list[Candidate]]:
    place = place.rstrip("/")
    parent, _, name = place.rpartition("/")
    if step_of(name) is not None:
        storage = open_storage(parent or ".")
        chosen = [one for one in candidates(storage) if one.folder == name]
    else:
        if not is_url(place) and Path(place).is_file():
            raise CheckpointError(f"{place}: a file; a checkpoint is a folder, such as RUN/checkpoints/step-00000100.")
        inner = Path(place) / CHECKPOINTS
        storage = open_storage(inner if not is_url(place) and inner.is_dir() else place)
        chosen = candidates(storage)
    if not chosen:
        raise CheckpointError(
            f"{place}: no checkpoint there. Give a folder like RUN/checkpoints/step-00000100, or one that holds such."
        )
    return storage, chosen


def check_config(manifest: Manifest, config: Any, where: str) -> None:
    """Refuses a checkpoint of another configuration.

    Raises:
        ConfigMismatchError: with one line per difference.
    """
    if config is None or manifest.config is None:
        return
    found = differences(manifest.config, config, MAY_CHANGE)
    lines = [f"{key}: {saved!r} in the checkpoint, {now!r} now" for key, saved, now in found]
    if lines:
        raise ConfigMismatchError(
            f"{where} was written by a run of another configuration:\n  " + "\n  ".join(lines) + "\n"
            "Give this run another run_dir, or restore with any_config=True if the difference is meant."
        )


def read_for_rank(storage: Storage, folder: str, attempt: str, backend: Backend, rows: ShardedReader) -> Loaded:
    """Reads and checks what one rank needs; all ranks together read every file.

    Raises:
        CorruptCheckpointError: naming the file that is not what was written.
        CheckpointError: when the folder changed since rank 0 has chosen it.
    """
    rank, world_size = backend.rank, backend.world_size
    manifest = read_manifest(storage, folder)
    if manifest.attempt != attempt:
        raise CheckpointError(f"{storage.root}/{folder} is another on rank {rank} than on rank 0: is the disk shared?")
    check_files(storage, folder, manifest)
    accelerator = backend.device if backend.device.type != "cpu" else None

    def load(name: str) -> Any:
        return StateReader(storage, folder, manifest, name).load(accelerator)

    own_buffers = buffers_name(rank) if f"{buffers_name(rank)}.json.gz" in manifest.files else buffers_name(0)
    own = 0 if rank >= manifest.world_size and _noise_is_shared(manifest) else rank
    loaded = Loaded(
        manifest,
        load_replicated(StateReader(storage, folder, manifest, REPLICATED), accelerator),
        load(rank_name(own)) if own < manifest.world_size else {},
        load(own_buffers) if f"{own_buffers}.json.gz" in manifest.files else {},
        rows.read(storage, folder, manifest),
    )
    orphans = range(rank + world_size, manifest.world_size, world_size)
    names = [rank_name(other) for other in orphans] + [buffers_name(other) for other in orphans]
    verify(storage, folder, [file for file in manifest.files if file.partition(".")[0] in names])
    return loaded


def load_replicated(reader: StateReader, accelerator: torch.device | None = None) -> dict[str, Any]:
    """Returns the state that is alike on all ranks: params, optimizer (by parameter name, or None), modules, extras.

    Raises:
        CorruptCheckpointError: when a byte differs from what was written, or something is missing.
    """
    state = reader.load(accelerator)
    parts = {"params", "optimizer", "tables", "modules", "module_params", "extras"}
    if not isinstance(state, dict) or state.keys() != parts:
        raise CorruptCheckpointError("the replicated state is not that of a run.")
    tables = state.pop("tables")
    optimizer = state["optimizer"] and own_groups(state["optimizer"], tables)
    return state | {"params": untabulate(state["params"], tables), "optimizer": optimizer}


def _noise_is_shared(manifest: Manifest) -> bool:
    noise = manifest.about.get("noise")
    return isinstance(noise, list) and len(noise) > 1 and len(set(map(str, noise))) == 1


def apply_noise(loaded: Loaded, backend: Backend) -> str:
    """Sets this rank's generators; returns a line for the log when it cannot simply go on with its own.

    A rank that had none gets a stream of its own, the same at each resume from this checkpoint; when all ranks drew the
    same noise, it joins them.
    """
    manifest, rank = loaded.manifest, backend.rank
    if loaded.own:
        try:
            restore_noise(loaded.own["noise"], backend.device)
        except ValueError as error:
            raise CorruptCheckpointError(str(error)) from error
    else:
        seed_stream(f"{manifest.attempt}:{manifest.step}:{rank}", backend.device)
    if backend.world_size == manifest.world_size:
        return ""
    return (
        f"resumed on {backend.world_size} rank(s) from a checkpoint of {manifest.world_size}: ranks that were there go "
        "on with their noise, others "
        + ("share it, since all drew the same" if _noise_is_shared(manifest) else "start new streams of their own")
    )

"""Which checkpoint a run resumes from, and what of it each rank reads.

Rank 0 alone lists the directory and names the checkpoints to try; the others follow its list, since two ranks that look
at a moment's distance may see different ones. Every rank then reads and checks its files, and only when all have
succeeded is any of it put to use: a checkpoint that one rank finds damaged counts as damaged on all of them. One that a
rank cannot read ends the run on all ranks: an older one in its place would lose steps that are on the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distopt.backends.base import Backend, Json
from distopt.checkpoint.columns import states_of, untabulate
from distopt.checkpoint.errors import (
    CheckpointError,
    ConfigMismatchError,
    CorruptCheckpointError,
    UnreadableCheckpointError,
    describe_error,
)
from distopt.checkpoint.finite import nonfinite, nonfinite_statistics
from distopt.checkpoint.format_3 import upgrade_rank, upgrade_replicated
from distopt.checkpoint.manifest import FORMAT_3, Manifest
from distopt.checkpoint.param_store import with_names_of_today
from distopt.checkpoint.reader import Candidate, candidates, check_files, read_manifest, verify
from distopt.checkpoint.run_state import RunState
from distopt.checkpoint.sharded_params import LocalState, ShardedReader
from distopt.checkpoint.statefile import StateReader
from distopt.checkpoint.storage.base import Storage, open_storage
from distopt.config import checkpoints_of, differences
from distopt.config.paths import is_url
from distopt.rng import preserve_rng_during_setup, restore_rng_state, seed_stream
from distopt.run_files import step_of

REPLICATED = "replicated"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a run was restored from."""

    step: int
    """Steps done when it was saved."""
    progress: Any
    """What rank 0 passed to `save` as `progress`."""
    path: str
    """Its folder or URL."""
    world_size: int
    """Number of ranks that wrote it, which may be more or fewer than now."""
    changes: tuple[str, ...] = ()
    """What the optimizer is asked for now and was not then, such as `lr 0.02 -> 0.005 from step 606`."""
    config: Any = None
    """The configuration with which it was saved, None if none was given."""
    only: tuple[str, ...] | None = None
    """What was taken from it; None means all."""


@dataclass(frozen=True)
class Request:
    """What is asked of a checkpoint.

    Attributes:
        only: What to take, some of `params` and `optimizer`; None takes all.
        new_run: Whether another run starts from it, which counts its steps, and those of schedules, from 0.
        schedule_every: Steps between two steps of a schedule.
    """

    only: tuple[str, ...] | None = None
    new_run: bool = False
    schedule_every: int = 1


@dataclass(frozen=True)
class Loaded:
    """What one rank has read and checked, and not yet put to use."""

    manifest: Manifest
    replicated: dict[str, Any]
    rank_local: Mapping[str, Any]
    """Random number generators and objects of this rank; empty on a rank that the saving run did not have."""
    buffers: Mapping[str, Any]
    local_params: LocalState


def rank_name(rank: int) -> str:
    """Returns the name of the state that one rank alone has."""
    return f"rank-{rank:05d}"


def buffers_name(rank: int) -> str:
    """Returns the name of one rank's module buffers; ranks whose buffers equal rank 0's have none."""
    return f"buffers-{rank:05d}"


# Choosing: which checkpoints to try, best first.


def choose(storage: Storage, which: str | int | Path) -> tuple[Storage, list[Candidate]]:
    """Returns where to look and the checkpoints to try, best first; none when there is none and "auto" was asked for.

    Raises:
        CheckpointError: The step or path that was asked for is not there.
    """
    if which == "auto":
        return storage, candidates(storage)
    if isinstance(which, int):
        known = candidates(storage)
        chosen = [each for each in known if each.step == which]
        if not chosen:
            raise CheckpointError(
                f"{storage.root}: no checkpoint of step {which}; there are {sorted(each.step for each in known)}."
            )
        return storage, chosen[:1]
    return _choose_path(str(which))


def _choose_path(path: str) -> tuple[Storage, list[Candidate]]:
    path = path.rstrip("/")
    parent, _, name = path.rpartition("/")
    if step_of(name) is not None:
        storage = open_storage(parent or ".")
        chosen = [each for each in candidates(storage) if each.folder == name]
    else:
        if not is_url(path) and Path(path).is_file():
            raise CheckpointError(f"{path}: a file; a checkpoint is a folder, such as RUN/checkpoints/step-00000100.")
        # A run directory, or a folder (or URL) that holds checkpoints itself.
        inner = path if is_url(path) else checkpoints_of(Path(path))
        is_run = isinstance(inner, str) or inner.is_dir()
        storage = open_storage(inner if is_run else path)
        chosen = candidates(storage)

    if not chosen:
        raise CheckpointError(
            f"{path}: no checkpoint there. Give a folder like RUN/checkpoints/step-00000100, or one that holds such."
        )
    return storage, chosen


def choose_on_all_ranks(
    backend: Backend, storage: Storage, which: int | str | Path
) -> tuple[Storage, list[tuple[str, str, str]]]:
    """Returns where to look, and (folder, attempt, what is wrong with it) of each checkpoint to try; collective.

    Raises:
        CheckpointError: Rank 0 did not find what was asked for; on all ranks.
        UnreadableCheckpointError: A checkpoint cannot be read, so that nobody knows whether it is the newest; likewise.
    """
    choice: dict[str, Json] = {}
    if backend.rank == 0:
        try:
            chosen_storage, chosen = choose(storage, which)
            unreadable = next((each.error for each in chosen if each.is_unreadable), None)
            tries = [(each.folder, each.manifest.attempt if each.manifest else "", each.error) for each in chosen]
            choice = {"error": None, "unreadable": unreadable, "root": chosen_storage.root, "tries": tries}
        except Exception as error:
            choice = {"error": describe_error(error), "unreadable": None}

    choice = backend.all_gather_json(choice)[0]
    if choice["unreadable"]:
        raise UnreadableCheckpointError(choice["unreadable"])
    if choice["error"]:
        raise CheckpointError(choice["error"])
    root = choice["root"]
    return (storage if root == storage.root else open_storage(root)), choice["tries"]


def check_config(manifest: Manifest, config: Any, ignore_keys: Collection[str], where: str) -> None:
    """Refuses a checkpoint of another configuration.

    Args:
        manifest: Of the checkpoint; one that was saved without a configuration is not compared.
        config: Of this run; None is not compared.
        ignore_keys: Dotted keys that may differ, with all below them.
        where: The checkpoint, for the message.

    Raises:
        ConfigMismatchError: With one line per difference.
    """
    if config is None or manifest.config is None:
        return
    lines = [
        f"{key}: {saved!r} in the checkpoint, {now!r} now"
        for key, saved, now in differences(manifest.config, config, ignore_keys)
    ]
    if lines:
        raise ConfigMismatchError(
            f"{where} was written by a run with another configuration:\n  " + "\n  ".join(lines) + "\n"
            "Set these keys back to continue that run. If the difference is intended, continue from its parameters "
            "alone with checkpoint.resume_only=[params], start anew with checkpoint.resume=never, or give this run "
            "another run_dir. In a script: restore(only=['params']), or restore(any_config=True)."
        )


def narrowed(request: Request, manifest: Manifest, config: Any, ignore_keys: Collection[str]) -> Request:
    """Returns what to take of a checkpoint: all of one that this run has saved since it began with less.

    Args:
        request: What is asked of any checkpoint.
        manifest: Of this one.
        config: Of this run.
        ignore_keys: Keys of it that may differ.
    """
    if request.only is None or request.new_run or manifest.about.get("only") != [*request.only]:
        return request
    is_same = next(differences(manifest.config, config, ignore_keys), None) is None
    return replace(request, only=None) if is_same else request


# Reading: what each rank needs, checked.


def read_on_all_ranks(
    storage: Storage, folder: str, attempt: str, backend: Backend, rows: ShardedReader
) -> tuple[Loaded | None, str]:
    """Returns what this rank has read, or None and the first rank's finding if one is damaged; collective.

    Raises:
        UnreadableCheckpointError: A rank could not read its files; on all ranks.
        CheckpointError: A rank could not take them up for another reason (out of memory); on all ranks.
    """
    loaded: Loaded | None = None
    problem: tuple[str, str] | None = None
    try:
        loaded = _read_for_rank(storage, folder, attempt, backend, rows)
    except CorruptCheckpointError as error:
        problem = ("damaged", str(error))
    except UnreadableCheckpointError as error:
        problem = ("unreadable", str(error))
    except Exception as error:  # raised on one rank alone, it would leave the others waiting
        problem = ("failed", f"{storage.root}/{folder}: {describe_error(error)}")

    # Damage that one rank has proven decides before what another could not read.
    problems = backend.all_gather_json(problem)
    for kind in ("damaged", "failed", "unreadable"):
        for rank, each in enumerate(problems):
            if each is None or each[0] != kind:
                continue
            if kind == "damaged":
                return None, each[1]
            text = f"rank {rank} of {len(problems)}: {each[1]}" if len(problems) > 1 else each[1]
            raise UnreadableCheckpointError(text) if kind == "unreadable" else CheckpointError(text)
    return loaded, ""


def _read_for_rank(storage: Storage, folder: str, attempt: str, backend: Backend, rows: ShardedReader) -> Loaded:
    """Reads and checks what one rank needs; all ranks together read every file.

    Raises:
        CorruptCheckpointError: Naming the file that is not what was written.
        CheckpointError: The folder has changed since rank 0 chose it.
    """
    rank, world_size = backend.rank, backend.world_size
    manifest = read_manifest(storage, folder)
    if manifest.attempt != attempt:
        raise CheckpointError(
            f"{storage.root}/{folder} is another checkpoint on rank {rank} than on rank 0: is the disk shared?"
        )
    check_files(storage, folder, manifest)
    accelerator = backend.device if backend.device.type != "cpu" else None

    def load(name: str) -> Any:
        return StateReader(storage, folder, manifest, name).load(accelerator)

    def load_rank(rank: int) -> Any:
        state = load(rank_name(rank))
        return upgrade_rank(state) if manifest.format == FORMAT_3 else state

    # A rank that the saving run did not have takes rank 0's buffers; its generators start anew, unless all ranks drew
    # the same numbers.
    buffers = buffers_name(rank) if f"{buffers_name(rank)}.json.gz" in manifest.files else buffers_name(0)
    source = 0 if rank >= manifest.world_size and _rng_is_shared(manifest) else rank
    loaded = Loaded(
        manifest,
        load_replicated(StateReader(storage, folder, manifest, REPLICATED), accelerator),
        load_rank(source) if source < manifest.world_size else {},
        load(buffers) if f"{buffers}.json.gz" in manifest.files else {},
        rows.read(storage, folder, manifest),
    )

    local = {"params": loaded.local_params.params, "optimizers": loaded.local_params.optimizers, "modules": {}}
    broken = ", ".join(
        filter(None, (nonfinite(loaded.replicated), nonfinite(local), nonfinite_statistics(loaded.buffers)))
    )
    if broken:
        raise CorruptCheckpointError(f"{storage.root}/{folder}: {broken} not finite, so a run cannot continue from it.")

    # Files of ranks that are gone are used by no one and still checked: all of the checkpoint is good, or none of it.
    orphans = range(rank + world_size, manifest.world_size, world_size)
    names = [rank_name(other) for other in orphans] + [buffers_name(other) for other in orphans]
    verify(storage, folder, [file for file in manifest.files if file.partition(".")[0] in names])
    return loaded


def load_replicated(reader: StateReader, accelerator: torch.device | None = None) -> dict[str, Any]:
    """Returns the state that is equal on all ranks, whichever format it was written in.

    Returns:
        `params` by name, `optimizers` (by name, their state dicts by parameter name), `modules`, `module_params` (names
        in Pyro's store of the modules' other parameters), `objects`.

    Raises:
        CorruptCheckpointError: A byte differs from what was written, or something is missing.
    """
    state = reader.load(accelerator)
    if reader.manifest.format == FORMAT_3:
        return upgrade_replicated(state)
    keys = {"params", "tables", "optimizers", "modules", "module_params", "objects"}
    if not isinstance(state, dict) or state.keys() - {"settings"} != keys:  # the first of format 4 had no settings
        raise CorruptCheckpointError("the replicated state is not that of a run.")
    params = untabulate(state["params"], state.pop("tables"))
    optimizers = {name: states_of(saved) for name, saved in state["optimizers"].items()}
    return state | {"params": params, "optimizers": optimizers}


def _rng_is_shared(manifest: Manifest) -> bool:
    """Returns whether all ranks stood at the same point of the same stream of random numbers."""
    digests = manifest.about.get("rng")
    return isinstance(digests, list) and len(digests) > 1 and len(set(map(str, digests))) == 1


# Applying: the run takes up what was read.


def apply_loaded(loaded: Loaded, state: RunState, backend: Backend, request: Request) -> tuple[str, ...]:
    """Puts the run's objects, Pyro's store and the random number generators into the state that was read.

    Returns:
        What the optimizers are asked for now and were not then.

    Raises:
        CheckpointError: An object does not accept its state, or this process lacks something; objects before it have
            been restored already.
    """
    if loaded.local_params.problem:
        raise CheckpointError(loaded.local_params.problem)
    replicated = with_names_of_today(loaded.replicated)
    replicated["params"] = replicated["params"] | loaded.local_params.params
    optimizers = replicated["optimizers"]
    names = optimizers.keys() | loaded.local_params.optimizers.keys()
    replicated["optimizers"] = {
        name: optimizers.get(name, {}) | loaded.local_params.optimizers.get(name, {}) for name in sorted(names)
    }

    step = loaded.manifest.step
    changes: list[str] = []
    if request.only is None or "optimizer" in request.only:
        replicated["settings"] = replicated.get("settings") or settings_of_config(loaded.manifest.config, optimizers)
        replicated["optimizers"], changes = state.revise_optimizers(
            replicated, step // request.schedule_every, restarts=request.new_run
        )

    same_world = loaded.manifest.world_size == backend.world_size
    state.apply(replicated, loaded.buffers, loaded.rank_local if same_world else None, request.only)
    preserve_rng_during_setup(state.modules.values(), backend.device)
    if request.only is None:
        _apply_rng(loaded, backend)
    first = 1 if request.new_run else step + 1
    return tuple(f"{change} from step {first:,}" for change in changes)


def settings_of_config(config: Any, optimizers: Collection[str]) -> dict[str, Any]:
    """Returns the settings of the optimizer of a YAML run whose checkpoint was written before they were saved."""
    section = config.get("optim") if isinstance(config, dict) else None
    if not isinstance(section, dict) or len(optimizers) != 1 or not {"name", "args"} <= section.keys():
        return {}
    schedule = section.get("scheduler")
    clip = {key: value for key, value in (section.get("clip") or {}).items() if value is not None}
    return {
        next(iter(optimizers)): {
            "optimizer": str(section["name"]).rpartition(":")[2],
            "args": [[section["args"], None]],
            "scheduler": schedule and [str(schedule["name"]).rpartition(":")[2], schedule["args"]],
            "clip": clip,
        }
    }


def _apply_rng(loaded: Loaded, backend: Backend) -> None:
    """Sets this rank's generators, and says so in the log when they do not simply continue.

    A rank that had none gets a stream that no other rank has, the same at each resume from this checkpoint; when all
    ranks drew the same numbers, it joins them.
    """
    manifest = loaded.manifest
    if loaded.rank_local:
        try:
            restore_rng_state(loaded.rank_local["rng"], backend.device)
        except ValueError as error:
            raise CorruptCheckpointError(str(error)) from error
    else:
        seed_stream(f"{manifest.attempt}:{manifest.step}:{backend.rank}", backend.device)

    if backend.world_size != manifest.world_size:
        logger.warning(
            "resumed on %d rank(s) from a checkpoint of %d: ranks that were there continue their random number "
            "streams, others %s",
            backend.world_size,
            manifest.world_size,
            "share them, since all ranks drew the same" if _rng_is_shared(manifest) else "start new ones",
        )

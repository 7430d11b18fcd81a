"""Saves all state of a run while it continues, and restores it: the one class that training code needs."""

from __future__ import annotations

import logging
import platform
import sys
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyro
import torch
from pyro.optim.optim import PyroOptim
from torch import nn

import distopt
from distopt.backends import current
from distopt.backends.base import Backend, Json
from distopt.checkpoint.background import BackgroundSave
from distopt.checkpoint.chunks import chunk_digest
from distopt.checkpoint.codec import NoTensors, decode, encode
from distopt.checkpoint.commit import Attempt
from distopt.checkpoint.consensus import agree_no_error, agree_to_save, claim_directory, newest_known
from distopt.checkpoint.errors import CheckpointError, NonfiniteStateError, describe_error
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.manifest import FileRecord, Manifest, config_as_json
from distopt.checkpoint.module_state import align_buffers_
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.restore import (
    REPLICATED,
    Request,
    Restored,
    apply_loaded,
    buffers_name,
    check_config,
    choose_on_all_ranks,
    narrowed,
    rank_name,
    read_on_all_ranks,
)
from distopt.checkpoint.retention import Retention
from distopt.checkpoint.run_state import RunState, Stateful
from distopt.checkpoint.sharded_params import ShardedReader, plate_sizes, shard_name
from distopt.checkpoint.snapshot import HostMemory, Snapshot, take_snapshot, without_collection
from distopt.checkpoint.storage.base import open_storage
from distopt.checkpoint.storage.names import step_number
from distopt.rng import rng_state_digest

logger = logging.getLogger(__name__)
_DEFAULT_RETENTION = Retention(3)
PARTIAL = ("optimizer", "params")
"""What of a checkpoint can be taken without the rest."""


class Checkpointer:
    """Keeps the checkpoints of one run in one directory.

    What is saved: Pyro's parameter store with constraints; the state of the objects in `state` and `per_rank` (of an
    optimizer by parameter name, with its schedulers; of a module its buffers, and its parameters outside the store);
    every rank's random number generators; the progress; the configuration; and versions. Rank 0 writes what is equal on
    all ranks, each rank what differs.

    Every rank makes a Checkpointer with the same arguments and calls `save` and `restore` at the same steps: these, and
    the constructor, are collective. A save copies the state, agrees with the other ranks in one small collective, and
    returns. A thread then writes, and ranks confirm to each other through the directory and never through the process
    group, whose collectives belong to training. So all ranks must see the same directory.

    A save that fails (a full disk, no permission) is logged as an error and training continues; the last good
    checkpoint remains. `wait` raises the error, so that a run whose last save failed does not end as a success.

    Args:
        directory: Where checkpoints are written; made if missing. Or a URL that fsspec knows: there a checkpoint is
            committed by the appearance of its manifest.
        state: By name, the objects whose state is equal on all ranks: optimizers (`PyroOptim`), modules (under the
            names by which they are registered with Pyro), and anything with `state_dict` and `load_state_dict`. None
            saves only Pyro's parameters and the generators.
        per_rank: By name, objects with a state that each rank has for itself. It is not restored on another number of
            ranks.
        keep: Which checkpoints are kept.
        config: Of the run, nested mappings, sequences and plain values; None records and compares nothing. A checkpoint
            of another configuration is refused.
        ignore_keys: Dotted keys of `config` that may differ, with all below them.
        backend: The link to the other ranks; None means `distopt.backends.current()`.
        background: Whether a thread writes. False writes before `save` returns.
        when_busy: What `save` does while the previous save is still being written: "wait" for it, or "skip" this one
            with a warning.
        timeout: How long ranks wait for each other in one save; None means the backend's timeout.

    Raises:
        TypeError: An object in `state` or `per_rank` has no state.
        ValueError: A name is in both mappings.
        DirectoryInUseError: Another job writes to the directory.
        CheckpointError: The directory cannot be written, or ranks see different ones.
        UnreadableCheckpointError: A checkpoint there cannot be read, so that nobody knows whether it is the newest.

    Example:
        >>> import pyro, tempfile
        >>> from pyro.optim import Adam
        >>> optimizer = Adam({"lr": 0.1})
        >>> with Checkpointer(tempfile.mkdtemp(), {"optimizer": optimizer}) as checkpointer:
        ...     start = checkpointer.restore()
        ...     value = pyro.param("x", torch.zeros(2))
        ...     checkpointer.save(100, progress={"epoch": 3})
        ...     checkpointer.wait()
        ...     print(start, checkpointer.steps())
        None [100]
    """

    def __init__(
        self,
        directory: str | Path,
        state: Mapping[str, PyroOptim | nn.Module | Stateful] | None = None,
        *,
        per_rank: Mapping[str, Stateful] | None = None,
        keep: Retention = _DEFAULT_RETENTION,
        config: Mapping[str, Any] | None = None,
        ignore_keys: Collection[str] = (),
        backend: Backend | None = None,
        background: bool = True,
        when_busy: Literal["wait", "skip"] = "wait",
        timeout: timedelta | None = None,
    ) -> None:
        self._backend = backend or current()
        if isinstance(ignore_keys, str):
            raise TypeError(f"ignore_keys is {ignore_keys!r}; expected a list of keys, such as [{ignore_keys!r}]")
        if when_busy not in ("wait", "skip"):
            raise ValueError(f"when_busy is {when_busy!r}; expected 'wait' or 'skip'")
        self._state = RunState(state or {}, per_rank or {})
        self._storage = open_storage(directory)
        self._keep = keep
        self._config = None if config is None else config_as_json(config)
        self._ignore_keys = frozenset(ignore_keys)
        self._background = background
        self._when_busy = when_busy
        self._timeout = timeout or self._backend.timeout
        self._accelerator = self._backend.device if self._backend.device.type != "cpu" else None
        self._memory = HostMemory(pinned=self._accelerator is not None)
        self._last: BackgroundSave | None = None
        self._only: tuple[str, ...] | None = None  # what the run has taken of the checkpoint that it began with
        self.committed_at: float | None = None
        """When the state that was committed last was copied, by `time.monotonic()`; None before the first commit."""

        self._claimed = claim_directory(self._backend, self._storage)
        self._generation = newest_known(self._backend, self._storage)[0] + 1

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, step: int, *, progress: Json = None, best: int | None = None) -> None:
        """Saves the run as it is now, as `step`; returns when the state has been copied.

        Args:
            step: Steps done so far; saving a step again that the last save has committed does nothing.
            progress: The position in the data and whatever else the loop needs to resume; no tensors. Rank 0's is kept.
            best: The step of the best checkpoint so far, which is kept with those that `keep` names.

        Raises:
            CheckpointError: Something cannot be described, or the save before was refused as not finite; on all ranks.

        Cost:
            One copy of the state on this thread, and two `all_gather_json` where there are other ranks; an all-reduce
            for each buffer that differs between them.
        """
        started_at = time.perf_counter()
        rank = self._backend.rank
        busy = self._last is not None and self._last.running and self._when_busy == "skip"
        self._keep = replace(self._keep, best=best)
        snapshots: dict[str, Snapshot] = {}
        encoded_progress: Json = None
        message: dict[str, Json] = {"step": None, "busy": busy, "error": None}

        align_buffers_(self._state.all_modules(), self._backend)
        # Whatever fails on this rank is sent to the others instead of raised, so that none waits for a rank that left.
        try:
            message["step"] = step = step_number(step)
            encoded_progress = encode(progress, NoTensors(), (None, "progress"))
            if rank == 0:
                # All ranks take rank 0's name for this attempt, so that files of another one can never be mixed in.
                message |= {"attempt": uuid.uuid4().hex[:12], "saved": not busy and _has_saved(self._last, step)}
            if not busy:
                self._finish()
                _raise_nonfinite(self._last)
                snapshots = self._snapshot()
                message["buffers"] = _digest(snapshots["buffers"])
                message["rng"] = rng_state_digest(snapshots["rank"].tree["rng"])
                message["plates"] = plate_sizes()
        except Exception as error:
            message["error"] = describe_error(error)
        failpoint("after_snapshot", rank)

        messages = self._backend.all_gather_json(message)
        failpoint("after_agreement", rank)
        reason = agree_to_save(step, messages)
        if reason:
            logger.warning("step %d: %s", step, reason)
            return
        self._start(step, encoded_progress, snapshots, messages)
        logger.info("step %d: copied in %.3f s", step, time.perf_counter() - started_at)

    def wait(self) -> None:
        """Returns when the save in progress is committed; not collective.

        Raises:
            CheckpointError: The last save has failed. It is raised once.
        """
        if self._last is not None:
            self._last.wait(4 * self._timeout)

    def restore(
        self,
        which: Literal["auto", "never"] | int | str | Path = "auto",
        *,
        any_config: bool = False,
        only: Collection[str] | None = None,
        new_run: bool = False,
        schedule_every: int = 1,
    ) -> Restored | None:
        """Restores a checkpoint, in a new process or by rolling back in a running one.

        An optimizer keeps its moments, and what it was made with now wins over the checkpoint: learning rate, weight
        decay, schedule. A schedule counts on; a changed one is where it would be had the run begun with it.

        Args:
            which: "auto" is the newest good checkpoint; "never" does nothing; a step; or the path of a checkpoint, or
                of a directory of them.
            any_config: Accept a checkpoint of another configuration.
            only: What to take, "params" (with all of the modules) and "optimizer"; None takes all. Another
                configuration is accepted then. A checkpoint that this run has saved since it was restored with the same
                `only` and configuration is taken as a whole, so that the same program resumes exactly.
            new_run: Another run starts from the checkpoint (fine-tuning): schedules start anew, and of what else is in
                it only what `only` names is taken, by default parameters and optimizer.
            schedule_every: Steps between two steps of the schedule, where the run has one and the checkpoint has none.

        Returns:
            What was restored, None when there is nothing to restore.

        Raises:
            ValueError: `only` names something else.
            CheckpointError: There are checkpoints but none can be loaded, or not the one asked for; on all ranks.
                Nothing has been changed then. Or an object does not accept its state; others may have been restored.
            UnreadableCheckpointError: A checkpoint that may be the newest good one cannot be read; on all ranks.
                Nothing has been changed or deleted, and no older one is taken in its place.
            ConfigMismatchError: It is of another configuration. Nothing has been changed then.

        Cost:
            Each rank reads the replicated state and its own; a few `all_gather_json`.
        """
        self._finish()
        request = _request(only, new_run, schedule_every)
        self._only = request.only
        if which == "never":
            return None

        storage, tries = choose_on_all_ranks(self._backend, self._storage, which)
        rows = ShardedReader(self._backend)
        # From the newest to the oldest, until one is whole on all ranks. The others are left alone: only retention
        # deletes.
        for folder, attempt, problem in tries:
            loaded, error = (
                (None, problem) if problem else read_on_all_ranks(storage, folder, attempt, self._backend, rows)
            )
            if loaded is None:
                logger.error("%s Falling back to the previous checkpoint.", error)
                continue

            path = f"{storage.root}/{folder}"
            asked = narrowed(request, loaded.manifest, self._config, self._ignore_keys)
            if not any_config and asked.only is None:
                check_config(loaded.manifest, self._config, self._ignore_keys, path)
            newest = newest_known(self._backend, self._storage)  # may raise, so it comes before anything is changed
            failure: Exception | None = None
            changes: tuple[str, ...] = ()
            try:
                changes = apply_loaded(loaded, self._state, self._backend, asked)
            except Exception as caught:
                failure = caught
            agree_no_error(self._backend, failure, path)
            self._continue_from(loaded.manifest, *newest)
            return _restored(loaded.manifest, path, asked, changes)

        if tries:
            raise CheckpointError(
                f"{storage.root}: none of the {len(tries)} checkpoints can be loaded, and distopt will not overwrite "
                "them by starting from scratch. Move the directory away, name a specific checkpoint "
                "(checkpoint.resume), or give the run another directory (run_dir); `distopt checkpoint verify` shows "
                "details."
            )
        return None

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that are there, ascending; only `restore` checks that each is whole."""
        return sorted(each.step for each in candidates(self._storage))

    def close(self) -> None:
        """Waits for the save in progress and lets other jobs use the directory."""
        self._finish()
        self._claimed.close()

    def _snapshot(self) -> dict[str, Snapshot]:
        """Copies this rank's state, by kind (see `RunState.capture`)."""
        with without_collection():
            snapshots = {
                kind: take_snapshot(captured, self._memory, kind, self._accelerator)
                for kind, captured in self._state.capture(self._backend).items()
            }
        self._memory.trim()
        return snapshots

    def _start(
        self, step: int, progress: Json, snapshots: Mapping[str, Snapshot], messages: list[dict[str, Any]]
    ) -> None:
        """Starts to write what all ranks have agreed to save."""
        rank, world_size = self._backend.rank, self._backend.world_size
        attempt = Attempt(step, messages[0]["attempt"], rank, world_size, self._timeout)
        differ = messages[rank]["buffers"] != messages[0]["buffers"]
        named = _by_file(snapshots, rank, has_buffers=differ or (rank == 0 and bool(self._state.all_modules())))
        about = _about(self._backend) | {"only": self._only and [*self._only]}
        about |= {key: [each[key] for each in messages] for key in ("rng", "plates")}

        # The thread reads these values later, when a restore may have changed the attributes.
        generation = self._generation
        config = self._config
        copied_at = time.monotonic()

        def committed() -> None:
            self.committed_at = copied_at

        def describe(files: Mapping[str, FileRecord]) -> Manifest:
            return Manifest(step, attempt.id, generation, world_size, files, progress, config, about)

        self._last = BackgroundSave(self._storage, attempt, named, describe, self._keep, committed)
        if self._background:
            self._last.start()
        else:
            self._last.run()

    def _finish(self) -> None:
        if self._last is not None:
            self._last.finish()

    def _continue_from(self, manifest: Manifest, generation: int, newest: str) -> None:
        """Notes where the run continues, given the newest checkpoint of the directory and its attempt.

        The newest checkpoint is the one of the highest (generation, step). A run that goes back to an older step begins
        a new generation; its next save of any step is then the newest, and the abandoned ones are deleted with it.
        """
        self._generation = generation + (newest != manifest.attempt) if newest else 0
        self._last = None
        logger.info("restored step %d", manifest.step)


def _by_file(snapshots: Mapping[str, Snapshot], rank: int, *, has_buffers: bool) -> dict[str, Snapshot]:
    """Returns the snapshots that this rank writes by the name of their file.

    Buffers are equal on all ranks unless they hold batch statistics: one digest per rank, gathered with all else that
    a save agrees on, tells which have to be written.
    """
    named = {rank_name(rank): snapshots["rank"]}
    if rank == 0:
        named[REPLICATED] = snapshots[REPLICATED]
    if has_buffers:
        named[buffers_name(rank)] = snapshots["buffers"]
    if "shard" in snapshots:
        named[shard_name(rank)] = snapshots["shard"]
    return named


def _raise_nonfinite(last: BackgroundSave | None) -> None:
    """Raises if the state of the save before was refused, once: what follows from that state is of no use."""
    if last is not None and isinstance(last.error, NonfiniteStateError):
        last.wait(timedelta(0))


def _has_saved(last: BackgroundSave | None, step: int) -> bool:
    # A loop that saves every n steps and once more at its end may come twice to the same step.
    if last is None or last.step != step:
        return False
    last.finish()
    return last.error is None


def _request(only: Collection[str] | None, new_run: bool, schedule_every: int) -> Request:
    """Returns what is asked for.

    Raises:
        ValueError: `only` names something that cannot be taken alone.
    """
    if only is None and new_run:
        only = PARTIAL
    if only is not None and (isinstance(only, str) or not only or set(only) - set(PARTIAL)):
        raise ValueError(f"only={only!r} (checkpoint.resume_only): expected a list of {' and '.join(PARTIAL)}.")
    return Request(None if only is None else tuple(sorted(set(only))), new_run, schedule_every)


def _restored(manifest: Manifest, path: str, request: Request, changes: tuple[str, ...]) -> Restored:
    for change in changes:
        logger.info("%s", change)
    progress = decode(manifest.progress, NoTensors().get)
    return Restored(manifest.step, progress, path, manifest.world_size, changes, manifest.config, request.only)


def _about(backend: Backend) -> dict[str, Any]:
    return {
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": backend.name,
        "device": str(backend.device),
        "distopt": distopt.__version__,
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "byteorder": sys.byteorder,
    }


def _digest(snapshot: Snapshot) -> str:
    """Returns what is equal for equal snapshots."""
    return chunk_digest([memoryview(repr(snapshot.tree).encode()), *snapshot.blocks()])

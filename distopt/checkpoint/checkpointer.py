"""Saves everything a run is while it goes on, and puts it back: the one class that training code needs."""

from __future__ import annotations

import logging
import platform
import sys
import time
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyro
import torch
from pyro.optim import PyroOptim
from torch import nn

import distopt
from distopt.backends import current
from distopt.backends.base import Backend, Json
from distopt.checkpoint import run_state
from distopt.checkpoint.background import BackgroundSave
from distopt.checkpoint.codec import NoTensors, decode, encode
from distopt.checkpoint.columns import share_groups, tabulate
from distopt.checkpoint.commit import Attempt, chunk_digest, describe_error
from distopt.checkpoint.consensus import agree_no_error, agree_to_save, claim, gather
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.manifest import FileRecord, Manifest
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.recorded_config import without_private
from distopt.checkpoint.restore import (
    REPLICATED,
    Loaded,
    Restored,
    apply_noise,
    buffers_name,
    check_config,
    choose,
    rank_name,
    read_for_rank,
)
from distopt.checkpoint.sharded_params import ShardedReader, capture_local, plate_sizes, shard_name
from distopt.checkpoint.snapshot import HostMemory, Snapshot, take_snapshot, without_collection
from distopt.checkpoint.storage.base import Storage, open_storage
from distopt.checkpoint.storage.names import step_number
from distopt.optim.distributed import DistributedOptimizer
from distopt.rng import capture_noise, digest_noise, set_up_quietly
from distopt.sharding import local_parameters

logger = logging.getLogger(__name__)


class Checkpointer:
    """Keeps the checkpoints of one run in one directory.

    What is saved: Pyro's parameter store with constraints, the optimizer with its schedulers, modules (buffers, and
    parameters outside the store), `extras`, every rank's noise, the progress, the configuration, and versions. Rank 0
    writes what is alike on all ranks, each rank what it alone has.

    Every rank makes one, with the same arguments, and calls `save` and `restore` at the same steps: these, and the
    constructor, are collective. A save copies the state, agrees with the other ranks in one small collective, and
    returns; a thread then writes, and ranks confirm to each other through the directory, never through the process
    group, whose collectives belong to training. So all ranks must see the same directory.

    A save that fails (a full disk, no permission) is logged as an error and training goes on; the last good checkpoint
    stands. `wait` raises the error, so that a run whose last save failed does not end as a success.

    Args:
        directory: where to, made when missing; or a URL that fsspec knows, there the manifest's appearance is the
            commit.
        optimizer: saved by parameter name through `get_state` and `set_state`.
        modules: by the name under which they are registered with Pyro.
        backend: the link to the other ranks; None means `distopt.backends.current()`.
        config: of the run; a checkpoint of another one is refused.
        keep_last: the newest ones that stay, at least 2, so that there is one to fall back to.
        keep_every_steps: those at its multiples stay for ever.
        background: False writes before `save` returns.
        extras: objects with state that is alike on all ranks.
        rank_extras: objects with state that each rank has for itself; it is dropped on another number of ranks.
        when_busy: what `save` does while the save before still runs: "wait" for it, or "skip" this one with a warning.
        timeout: how long ranks wait for each other in one save; None means the backend's.

    Raises:
        DirectoryInUseError: when another job writes there.
        CheckpointError: when the directory cannot be written, or ranks see different ones.

    Example:
        >>> import pyro, tempfile
        >>> from pyro.optim import Adam
        >>> optimizer = Adam({"lr": 0.1})
        >>> with Checkpointer(tempfile.mkdtemp(), optimizer=optimizer) as checkpointer:
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
        *,
        optimizer: PyroOptim | None = None,
        modules: Mapping[str, nn.Module] | None = None,
        backend: Backend | None = None,
        config: Mapping[str, Any] | None = None,
        keep_last: int = 3,
        keep_every_steps: int | None = None,
        background: bool = True,
        extras: Mapping[str, run_state.Stateful] | None = None,
        rank_extras: Mapping[str, run_state.Stateful] | None = None,
        when_busy: Literal["wait", "skip"] = "wait",
        timeout: timedelta | None = None,
    ) -> None:
        self._backend = backend or current()
        self._storage = open_storage(directory)
        self._optimizer, self._modules = optimizer, dict(modules or {})
        self._extras, self._rank_extras = dict(extras or {}), dict(rank_extras or {})
        self._config = None if config is None else without_private(config)
        if keep_every_steps is not None and keep_every_steps < 1:
            raise ValueError(f"keep_every_steps is {keep_every_steps}: give 1 or more, or None for the last ones alone")
        self._keep = (keep_last, keep_every_steps)
        self._background, self._when_busy = background, when_busy
        self._timeout = timeout or self._backend.timeout
        self._accelerator = self._backend.device if self._backend.device.type != "cpu" else None
        self._memory = HostMemory(pinned=self._accelerator is not None)
        self._last: BackgroundSave | None = None
        self.committed_at: float | None = None
        """When the state committed last was copied, of `time.monotonic()`; None before the first commit."""
        claim(self._backend, self._storage)
        known = [one.manifest.generation for one in candidates(self._storage) if one.manifest]
        self._generation = max(known, default=-1) + 1

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, step: int, *, progress: Json = None) -> None:
        """Saves the run as it is now, as `step`; returns when it has been copied.

        Args:
            step: steps done so far; saving one again that the last save has committed does nothing.
            progress: the place in the data and whatever else the loop needs to go on; no tensors. Rank 0's is kept.

        Raises:
            CheckpointError: when something cannot be described (an unknown constraint, an unknown type), on all ranks.

        Cost: one copy of the state on this thread, and one `all_gather_json` when there are other ranks.
        """
        began = time.perf_counter()
        rank = self._backend.rank
        busy = self._last is not None and self._last.running and self._when_busy == "skip"
        snapshots: dict[str, Snapshot] = {}
        word: dict[str, Json] = {"step": None, "busy": busy, "error": None}
        place: Json = None
        try:
            word["step"] = step = step_number(step)
            place = encode(progress, NoTensors(), (None, "progress"))
            if rank == 0:
                word |= {"attempt": uuid.uuid4().hex[:12], "saved": not busy and self._is_saved(step)}
            if not busy:
                self._finish()
                with without_collection():
                    snapshots = self._snapshot()
                word["buffers"] = _digest(snapshots["buffers"])
                word["noise"] = digest_noise(snapshots["own"].tree["noise"])
                word["plates"] = plate_sizes()
        except Exception as error:
            word["error"] = describe_error(error)
        failpoint("after_snapshot", rank)
        words = gather(self._backend, word)
        failpoint("after_agreement", rank)
        reason = agree_to_save(step, words)
        if reason:
            logger.warning("step %d: %s", step, reason)
            return
        self._start(step, place, snapshots, words)
        logger.info("step %d: copied in %.3f s", step, time.perf_counter() - began)

    def wait(self) -> None:
        """Returns when the save under way is committed; not collective.

        Raises:
            CheckpointError: when the last save has failed. It is raised once.
        """
        if self._last is not None:
            self._last.wait(4 * self._timeout)

    def restore(
        self, which: Literal["auto", "never"] | int | str | Path = "auto", *, any_config: bool = False
    ) -> Restored | None:
        """Puts the run back to a checkpoint: in a new process, or by rolling back in a running one.

        Args:
            which: "auto" is the newest good one; "never" does nothing; a step; or the path of a checkpoint, or of a
                directory of them.
            any_config: accept a checkpoint of another configuration.

        Returns:
            What was restored, None when there is nothing to restore.

        Raises:
            CheckpointError: when there are checkpoints but none is good, or not the one asked for, on all ranks alike.
                Nothing has been changed then.
            ConfigMismatchError: when it is of another configuration.

        Cost: each rank reads the replicated state and its own; a few `all_gather_json`.
        """
        self._finish()
        if which == "never":
            return None
        storage, tries = self._choose(which)
        rows = ShardedReader(self._backend)
        for folder, attempt, problem in tries:
            loaded, error = (None, problem) if problem else self._read(storage, folder, attempt, rows)
            if loaded is not None:
                where = f"{storage.root}/{folder}"
                if not any_config:
                    check_config(loaded.manifest, self._config, where)
                self._apply(loaded, where)
                progress = decode(loaded.manifest.progress, NoTensors().get)
                return Restored(loaded.manifest.step, progress, where, loaded.manifest.world_size)
            logger.error("%s Falling back to the checkpoint before.", error)
        if tries:
            raise CheckpointError(
                f"{storage.root}: none of {len(tries)} checkpoint(s) is good, and a run does not start from zero over "
                "them. Move the directory away, or name a good one; `distopt checkpoint verify` tells more."
            )
        return None

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that are there, ascending; `restore` finds out whether each is whole."""
        return sorted(one.step for one in candidates(self._storage))

    def close(self) -> None:
        """Waits for the save under way and lets other jobs use the directory."""
        self._finish()
        self._storage.unlock()

    def _snapshot(self) -> dict[str, Snapshot]:
        outside, buffers, names = run_state.capture_modules(self._modules)
        own = {
            "noise": capture_noise(self._backend.device),
            "extras": {name: extra.state_dict() for name, extra in self._extras_of_rank().items()},
        }
        states: dict[str, Any] = {"own": own, "buffers": buffers}
        own_params = local_parameters()
        if own_params:
            states["shard"] = capture_local(self._optimizer)
        if self._backend.rank == 0:
            optimizer = None if self._optimizer is None else run_state.capture_optimizer(self._optimizer)
            tables: list[dict[str, Any]] = []
            if optimizer is not None:
                optimizer = {name: optimizer[name] for name in optimizer if name not in own_params}
                optimizer = share_groups(optimizer, tables)
            states[REPLICATED] = {
                "params": tabulate(run_state.capture_params(skip=own_params.__contains__), tables),
                "optimizer": optimizer,
                "tables": tables,
                "modules": outside,
                "module_params": names,
                "extras": {name: extra.state_dict() for name, extra in self._extras.items()},
            }
        snapshots = {
            name: take_snapshot(state, self._memory, name, self._accelerator) for name, state in states.items()
        }
        self._memory.trim()
        return snapshots

    def _extras_of_rank(self) -> dict[str, run_state.Stateful]:
        """Returns `rank_extras` and, of an optimizer whose compression is lossy, the errors that it makes up for."""
        distributed = self._optimizer if isinstance(self._optimizer, DistributedOptimizer) else None
        kept = None if distributed is None else distributed.rank_local_state
        return self._rank_extras if kept is None else {"compression": kept} | self._rank_extras

    def _start(self, step: int, place: Json, snapshots: dict[str, Snapshot], words: list[dict[str, Any]]) -> None:
        rank, world_size = self._backend.rank, self._backend.world_size
        attempt = Attempt(step, words[0]["attempt"], rank, world_size, self._timeout)
        named = {rank_name(rank): snapshots["own"]}
        if rank == 0:
            named[REPLICATED] = snapshots[REPLICATED]
        if words[rank]["buffers"] != words[0]["buffers"] or (rank == 0 and self._modules):
            named[buffers_name(rank)] = snapshots["buffers"]
        if "shard" in snapshots:
            named[shard_name(rank)] = snapshots["shard"]
        about = _about(self._backend) | {key: [word[key] for word in words] for key in ("noise", "plates")}
        generation, config, copied_at = self._generation, self._config, time.monotonic()

        def committed() -> None:
            self.committed_at = copied_at

        def describe(files: Mapping[str, FileRecord]) -> Manifest:
            return Manifest(step, attempt.id, generation, world_size, files, place, config, about)

        self._last = BackgroundSave(self._storage, attempt, named, describe, self._keep, committed)
        if self._background:
            self._last.start()
        else:
            self._last.run()

    def _finish(self) -> None:
        if self._last is not None:
            self._last.finish()

    def _is_saved(self, step: int) -> bool:
        last = self._last
        if last is None or last.step != step:
            return False
        last.finish()
        return last.error is None

    def _choose(self, which: int | str | Path) -> tuple[Storage, list[tuple[str, str, str]]]:
        """Returns where to look, and (folder, attempt, what is wrong with it) of each checkpoint to try; collective."""
        plan: dict[str, Json] = {}
        if self._backend.rank == 0:
            try:
                storage, found = choose(self._storage, which)
                tries = [(one.folder, one.manifest.attempt if one.manifest else "", one.error) for one in found]
                plan = {"error": None, "root": storage.root, "tries": tries}
            except Exception as error:
                plan = {"error": describe_error(error)}
        plan = gather(self._backend, plan)[0]
        if plan["error"]:
            raise CheckpointError(plan["error"])
        root = plan["root"]
        return (self._storage if root == self._storage.root else open_storage(root)), plan["tries"]

    def _read(self, storage: Storage, folder: str, attempt: str, rows: ShardedReader) -> tuple[Loaded | None, str]:
        """Returns what this rank has read, when every rank could read its part; else the first rank's error."""
        loaded, problem = None, ""
        try:
            loaded = read_for_rank(storage, folder, attempt, self._backend, rows)
        except Exception as error:  # on one rank alone, the others would wait for ever
            problem = describe_error(error)
        problems = [text for text in gather(self._backend, problem) if text]
        return (None, problems[0]) if problems else (loaded, "")

    def _apply(self, loaded: Loaded, where: str) -> None:
        error = None
        try:
            self._apply_state(loaded)
        except Exception as caught:
            error = caught
        agree_no_error(self._backend, error, where)
        manifest = loaded.manifest
        known = [one.manifest for one in candidates(self._storage) if one.manifest is not None]
        newest = max(((one.generation, one.step, one.attempt) for one in known), default=(0, 0, manifest.attempt))
        # Going back begins a new generation: what was saved after that step no longer counts as newer.
        self._generation = newest[0] + (newest[2] != manifest.attempt)
        self._last = None
        logger.info("restored %s: step %d", where, manifest.step)

    def _apply_state(self, loaded: Loaded) -> None:
        if loaded.local.problem:
            raise CheckpointError(loaded.local.problem)
        run_state.apply_params(loaded.replicated["params"] | loaded.local.params, self._modules)
        run_state.apply_modules(loaded.replicated["modules"], self._modules)
        run_state.apply_modules(loaded.buffers, self._modules)
        if self._optimizer is not None and loaded.replicated["optimizer"] is not None:
            run_state.apply_optimizer(loaded.replicated["optimizer"] | loaded.local.optimizer, self._optimizer)
        unused = run_state.apply_extras(loaded.replicated["extras"], self._extras)
        if loaded.manifest.world_size == self._backend.world_size:
            unused += run_state.apply_extras(loaded.own["extras"], self._extras_of_rank())
        if unused:
            logger.warning("the checkpoint also has the state of %s, which nothing here takes up", ", ".join(unused))
        set_up_quietly(self._modules.values(), self._backend.device)
        remark = apply_noise(loaded, self._backend)
        if remark:
            logger.warning("%s", remark)


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

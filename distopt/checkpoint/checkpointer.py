"""Saves everything a run is while it goes on, and puts it back: the one class that training code needs."""

from __future__ import annotations

import hashlib
import logging
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pyro
import torch
from pyro.optim import PyroOptim
from torch import nn

import distopt
from distopt.backends.base import Backend, Json
from distopt.checkpoint import live
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.manifest import FileRecord, Manifest
from distopt.checkpoint.memory import HostMemory
from distopt.checkpoint.noise import capture_noise, digest_noise
from distopt.checkpoint.reader import Candidate, candidates
from distopt.checkpoint.resume import (
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
from distopt.checkpoint.retention import remove_leftovers, retain
from distopt.checkpoint.settings import without_private
from distopt.checkpoint.statefile import Snapshot, take_snapshot
from distopt.checkpoint.storage import Storage, open_storage
from distopt.checkpoint.writer import Attempt, describe_error, write_checkpoint

logger = logging.getLogger(__name__)


@dataclass
class _Save:
    """A save under way, or the last one when it is over."""

    step: int
    over: threading.Event
    """Set when it is committed or has failed; cleaning up may go on in the thread."""
    thread: threading.Thread | None = None
    error: Exception | None = None
    reported: bool = False


class Checkpointer:
    """Keeps the checkpoints of one run in one directory.

    What is saved: Pyro's parameter store with constraints, the optimizer with its schedulers, modules (buffers, and
    parameters outside the store), `extras`, every rank's noise, the progress, the configuration, and versions. Rank 0
    writes what is alike on all ranks, each rank what it alone has.

    Every rank makes one, with the same arguments, and calls `save` and `restore` at the same steps: these, and the
    constructor, are collective. A save copies the state, agrees with the other ranks in one small collective, and returns;
    a thread then writes, and ranks confirm to each other through the directory, never through the process group, whose
    collectives belong to training. So all ranks must see the same directory.

    A save that fails (a full disk, no permission) is logged as an error and training goes on; the last good checkpoint
    stands. `wait` raises the error, so that a run whose last save failed does not end as a success.

    Args:
        directory: where to, made when missing; or a URL that fsspec knows, where the manifest's appearance is the commit.
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
        extras: Mapping[str, live.Stateful] | None = None,
        rank_extras: Mapping[str, live.Stateful] | None = None,
        when_busy: Literal["wait", "skip"] = "wait",
        timeout: timedelta | None = None,
    ) -> None:
        self._backend = backend or _current_backend()
        self._storage = open_storage(directory)
        self._optimizer, self._modules = optimizer, dict(modules or {})
        self._extras, self._rank_extras = dict(extras or {}), dict(rank_extras or {})
        self._config = None if config is None else without_private(config)
        self._keep = (keep_last, keep_every_steps)
        self._background, self._when_busy = background, when_busy
        self._timeout = timeout or self._backend.timeout
        self._accelerator = self._backend.device if self._backend.device.type != "cpu" else None
        self._memory = HostMemory(pinned=self._accelerator is not None)
        self._generation = 0
        self._last: _Save | None = None
        self._claim()

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
            progress: the place in the data and whatever else the loop needs to go on; rank 0's is kept.

        Raises:
            CheckpointError: when something cannot be described (an unknown constraint, an unknown type), on all ranks.

        Cost: one copy of the state on this thread, and one `all_gather_json` when there are other ranks.
        """
        began = time.perf_counter()
        busy = self._finish(block=self._when_busy == "wait")
        snapshots: dict[str, Snapshot] = {}
        word: dict[str, Json] = {"step": step, "busy": busy, "error": None}
        try:
            if not busy:
                snapshots = self._snapshot()
                word |= {"buffers": _digest(snapshots["buffers"]), "noise": snapshots["own"].tree["noise"]}
                word["noise"] = digest_noise(word["noise"])
        except Exception as error:
            word["error"] = describe_error(error)
        failpoint("after_snapshot", self._backend.rank)
        if self._backend.rank == 0:
            word |= {"attempt": uuid.uuid4().hex[:12], "known": self._is_saved(step)}
        words = self._gather(word)
        failpoint("after_agreement", self._backend.rank)
        if self._agree(step, words):
            self._start(step, progress, snapshots, words)
            logger.info("step %d: copied in %.3f s", step, time.perf_counter() - began)

    def wait(self) -> None:
        """Returns when the save under way is committed; not collective.

        Raises:
            CheckpointError: when the last save has failed. It is raised once.
        """
        last = self._last
        if last is None:
            return
        patience = 4 * self._timeout
        if not last.over.wait(patience.total_seconds()):
            raise CheckpointError(f"step {last.step}: still not saved after {patience.total_seconds():g} s.")
        if last.error is not None and not last.reported:
            last.reported = True
            raise CheckpointError(self._failure(last)) from last.error

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
        self._finish(block=True)
        if which == "never":
            return None
        choice: list[Candidate] = []
        storage, failed = self._storage, None
        if self._backend.rank == 0:
            try:
                storage, choice = choose(self._storage, which)
            except CheckpointError as error:
                failed = str(error)
        plan = self._gather({"error": failed, "root": storage.root, "tries": [_as_try(one) for one in choice]})[0]
        if plan["error"]:
            raise CheckpointError(plan["error"])
        storage = self._storage if plan["root"] == self._storage.root else open_storage(plan["root"])
        for folder, attempt, problem in plan["tries"]:
            loaded, error = self._read(storage, folder, attempt, problem)
            if loaded is not None:
                return self._apply(storage, folder, loaded, any_config)
            logger.error("%s Falling back to the checkpoint before.", error)
        if plan["tries"]:
            raise CheckpointError(
                f"{plan['root']}: none of {len(plan['tries'])} checkpoint(s) is good, and a run does not start from zero "
                "over them. Move the directory away, or name a good one; `distopt checkpoint verify` tells more."
            )
        return None

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints that are there, ascending; whether each is whole, restoring finds out."""
        return sorted(one.step for one in candidates(self._storage))

    def close(self) -> None:
        """Waits for the save under way, logs its failure, and lets other jobs use the directory."""
        self._finish(block=True)
        self._storage.unlock()
        self._last = None

    # Saving

    def _snapshot(self) -> dict[str, Snapshot]:
        outside, buffers = live.capture_modules(self._modules)
        own = {
            "noise": capture_noise(self._backend.device),
            "extras": {name: extra.state_dict() for name, extra in self._rank_extras.items()},
        }
        states: dict[str, Any] = {"own": own, "buffers": buffers}
        if self._backend.rank == 0:
            states[REPLICATED] = {
                "params": live.capture_params(),
                "optimizer": None if self._optimizer is None else live.capture_optimizer(self._optimizer),
                "modules": outside,
                "extras": {name: extra.state_dict() for name, extra in self._extras.items()},
            }
        snapshots = {name: take_snapshot(state, self._memory, name, self._accelerator) for name, state in states.items()}
        self._memory.trim()
        return snapshots

    def _agree(self, step: int, words: list[dict[str, Any]]) -> bool:
        """Says whether the save goes on; raises on all ranks when one of them cannot take part."""
        for rank, word in enumerate(words):
            if word["error"]:
                raise CheckpointError(f"step {step}, rank {rank} of {len(words)}: {word['error']}")
        steps = [word["step"] for word in words]
        if len(set(steps)) > 1:
            raise CheckpointError(f"ranks save different steps: {steps}. Call save at the same steps on every rank.")
        busy = [rank for rank, word in enumerate(words) if word["busy"]]
        if busy:
            logger.warning("step %d is not saved: rank(s) %s still write the save before", step, busy)
        elif words[0]["known"]:
            logger.info("step %d is saved already", step)
        return not busy and not words[0]["known"]

    def _start(self, step: int, progress: Json, snapshots: dict[str, Snapshot], words: list[dict[str, Any]]) -> None:
        rank, world_size = self._backend.rank, self._backend.world_size
        attempt = Attempt(step, words[0]["attempt"], rank, world_size, self._timeout)
        named = {rank_name(rank): snapshots["own"]}
        if rank == 0:
            named[REPLICATED] = snapshots[REPLICATED]
        if words[rank]["buffers"] != words[0]["buffers"] or (rank == 0 and self._modules):
            named[buffers_name(rank)] = snapshots["buffers"]
        about = self._about([word["noise"] for word in words])

        def describe(files: Mapping[str, FileRecord]) -> Manifest:
            return Manifest(
                step, attempt.id, self._generation, world_size, files, progress=progress, config=self._config, about=about
            )

        save = self._last = _Save(step, threading.Event())
        if self._background:
            save.thread = threading.Thread(
                target=self._write, args=(save, attempt, named, describe), name="distopt-checkpoint"
            )
            save.thread.start()
        else:
            self._write(save, attempt, named, describe)

    def _write(
        self,
        save: _Save,
        attempt: Attempt,
        snapshots: Mapping[str, Snapshot],
        describe: Callable[[Mapping[str, FileRecord]], Manifest],
    ) -> None:
        began = time.perf_counter()
        try:
            try:
                if attempt.rank == 0:
                    remove_leftovers(self._storage)
                files: dict[str, list[memoryview]] = {}
                for name, snapshot in snapshots.items():
                    files |= snapshot.files(name, {"step": str(attempt.step), "attempt": attempt.id})
                write_checkpoint(self._storage, attempt, files, describe)
            except Exception as error:
                save.error = error
                logger.error("%s", self._failure(save))
            else:
                logger.info("step %d: committed, %.2f s after its copy", attempt.step, time.perf_counter() - began)
            finally:
                save.over.set()
            failpoint("after_acknowledge", attempt.rank)
            if attempt.rank == 0 and save.error is None:
                retain(self._storage, *self._keep)
        except Exception as error:
            logger.error("%s: older checkpoints were not cleaned up: %s", self._storage.root, describe_error(error))

    def _failure(self, save: _Save) -> str:
        assert save.error is not None
        return (
            f"step {save.step} was NOT saved in {self._storage.root}: {describe_error(save.error)}. "
            "Training goes on; the last good checkpoint stands."
        )

    def _finish(self, *, block: bool) -> bool:
        """Returns whether the thread of the last save still runs; it does not when `block` is true."""
        thread = self._last.thread if self._last else None
        if thread is None:
            return False
        if block:
            thread.join()
        return thread.is_alive()

    def _is_saved(self, step: int) -> bool:
        return self._last is not None and self._last.step == step and self._last.error is None

    # Restoring

    def _read(self, storage: Storage, folder: str, attempt: str, problem: str) -> tuple[Loaded | None, str]:
        """Returns what this rank has read, when every rank could read its part; else the first rank's error."""
        if problem:
            return None, problem
        rank, world_size = self._backend.rank, self._backend.world_size
        loaded, error = None, None
        try:
            loaded = read_for_rank(storage, folder, attempt, rank, world_size, self._backend.device)
        except (CheckpointError, OSError) as caught:
            error = describe_error(caught)
        errors = [text for text in self._gather(error) if text]
        return (None, errors[0]) if errors else (loaded, "")

    def _apply(self, storage: Storage, folder: str, loaded: Loaded, any_config: bool) -> Restored:
        manifest = loaded.manifest
        if not any_config:
            check_config(manifest, self._config, f"{storage.root}/{folder}")
        error = None
        try:
            self._apply_state(loaded)
        except Exception as caught:
            error = caught
        errors = self._gather(None if error is None else describe_error(error))
        for rank, text in enumerate(errors):
            if text:
                raise CheckpointError(f"{storage.root}/{folder}, rank {rank} of {len(errors)}: {text}") from error
        known = [one.manifest for one in candidates(self._storage) if one.manifest is not None]
        newest = max(((one.generation, one.step, one.attempt) for one in known), default=(0, 0, manifest.attempt))
        self._generation = newest[0] + (newest[2] != manifest.attempt)
        self._last = None
        logger.info("restored %s/%s: step %d", storage.root, folder, manifest.step)
        return Restored(manifest.step, manifest.progress, f"{storage.root}/{folder}", manifest.world_size)

    def _apply_state(self, loaded: Loaded) -> None:
        same_ranks = loaded.manifest.world_size == self._backend.world_size
        live.apply_params(loaded.replicated["params"], self._modules)
        live.apply_modules(loaded.replicated["modules"], self._modules)
        live.apply_modules(loaded.buffers, self._modules)
        if self._optimizer is not None and loaded.replicated["optimizer"] is not None:
            live.apply_optimizer(loaded.replicated["optimizer"], self._optimizer)
        unused = live.apply_extras(loaded.replicated["extras"], self._extras)
        if same_ranks:
            unused += live.apply_extras(loaded.own["extras"], self._rank_extras)
        if unused:
            logger.warning("the checkpoint also has the state of %s, which nothing here takes up", ", ".join(unused))
        remark = apply_noise(loaded, self._backend.rank, self._backend.world_size, self._backend.device)
        if remark:
            logger.warning("%s", remark)

    # Among ranks

    def _claim(self) -> None:
        """Takes the directory for this job, on all ranks or on none."""
        error, token = None, ""
        try:
            if self._backend.rank == 0:
                token = self._storage.lock()
                remove_leftovers(self._storage)
            self._storage.check_writable()
        except (CheckpointError, OSError) as caught:
            error = caught
        words = self._gather({"error": None if error is None else describe_error(error), "token": token})
        problems = [f"rank {rank}: {word['error']}" for rank, word in enumerate(words) if word["error"]]
        if problems:
            self._storage.unlock()
            if isinstance(error, CheckpointError):
                raise error
            raise CheckpointError(f"{self._storage.root} cannot hold checkpoints: {'; '.join(problems)}") from error
        seen = self._gather(self._storage.lock_token() == words[0]["token"])
        blind = [rank for rank, same in enumerate(seen) if not same]
        if blind:
            self._storage.unlock()
            raise CheckpointError(
                f"{self._storage.root}: rank(s) {blind} of {len(seen)} do not see what rank 0 writes there. The directory "
                "must be on a file system that all workers share; or give a URL of an object store."
            )
        known = [one.manifest.generation for one in candidates(self._storage) if one.manifest]
        self._generation = max(known, default=-1) + 1

    def _gather(self, value: Json) -> list[Any]:
        return self._backend.all_gather_json(value) if self._backend.world_size > 1 else [value]

    def _about(self, noise: list[str]) -> dict[str, Any]:
        return {
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "backend": self._backend.name,
            "device": str(self._backend.device),
            "noise": noise,
            "distopt": distopt.__version__,
            "pyro": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "byteorder": sys.byteorder,
        }


def _current_backend() -> Backend:
    from distopt.backends import current

    return current()


def _as_try(one: Candidate) -> tuple[str, str, str]:
    return (one.folder, one.manifest.attempt if one.manifest else "", one.error)


def _digest(snapshot: Snapshot) -> str:
    digest = hashlib.sha256(repr(snapshot.tree).encode())
    for *_, block in snapshot.tensors:
        digest.update(block.numpy())
    return digest.hexdigest()

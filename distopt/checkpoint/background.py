"""One save in progress: the thread that writes while training continues, and what became of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial

from distopt.checkpoint.commit import Attempt, Describe, write_checkpoint
from distopt.checkpoint.errors import CheckpointError, NonfiniteStateError, describe_error
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.finite import check_snapshots
from distopt.checkpoint.retention import Retention, remove_leftovers, retain
from distopt.checkpoint.snapshot import Snapshot
from distopt.checkpoint.storage.base import Storage

logger = logging.getLogger(__name__)


class BackgroundSave:
    """Writes snapshots to storage, then deletes what is no longer kept; errors are logged when they happen.

    Args:
        storage: Where to.
        attempt: Which try of which step; rank 0 of it leads.
        snapshots: What this rank writes, by file name without suffix. They must not change until `over` is set.
        describe: Makes rank 0's manifest of all files.
        keep: Which checkpoints are kept.
        committed: Called in the thread once the checkpoint is committed.
    """

    def __init__(
        self,
        storage: Storage,
        attempt: Attempt,
        snapshots: Mapping[str, Snapshot],
        describe: Describe,
        keep: Retention,
        committed: Callable[[], None],
    ) -> None:
        self.step = attempt.step
        self.over = threading.Event()
        """Set once the checkpoint is committed or has failed; deletions may still be in progress."""
        self.error: Exception | None = None
        self._is_raised = False
        self._num_bytes = 0
        self._storage = storage
        self._attempt = attempt
        self._snapshots = snapshots
        self._describe = describe
        self._keep = keep
        self._committed = committed
        self._thread = threading.Thread(target=self.run, name="distopt-checkpoint")

    def start(self) -> None:
        """Runs in a new thread.

        It is no daemon: a process that ends by itself waits for the save that its last step started.
        """
        self._thread.start()

    def run(self) -> None:
        """Writes, commits and cleans up; never raises."""
        try:
            self._commit()
            failpoint("after_acknowledge", self._attempt.rank)
            if self._attempt.rank == 0 and self.error is None:
                retain(self._storage, self._keep)
        except Exception as error:
            logger.error("%s: older checkpoints were not cleaned up: %s", self._storage.root, describe_error(error))

    def finish(self) -> None:
        """Returns when its thread has ended, deletions included."""
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def running(self) -> bool:
        """Whether its thread is still working."""
        return self._thread.is_alive()

    def wait(self, patience: timedelta) -> None:
        """Returns when the checkpoint is committed.

        Raises:
            CheckpointError: It has failed (raised once, later calls return), or `patience` has passed.
        """
        if not self.over.wait(patience.total_seconds()):
            raise CheckpointError(f"step {self.step}: still not saved after {patience.total_seconds():g} s.")
        if self.error is not None and not self._is_raised:
            self._is_raised = True
            raise CheckpointError(self._failure()) from self.error

    def _commit(self) -> None:
        started_at = time.perf_counter()
        try:
            if self._attempt.rank == 0:
                remove_leftovers(self._storage, self._attempt.work_folder(self._storage))
            metadata = {"step": str(self.step), "attempt": self._attempt.id}
            files: dict[str, list[memoryview]] = {}
            for name, snapshot in self._snapshots.items():
                files |= snapshot.files(name, metadata)
            self._num_bytes = sum(len(piece) for pieces in files.values() for piece in pieces)
            rank, world_size = self._attempt.rank, self._attempt.world_size
            check = partial(check_snapshots, self._snapshots, rank, world_size)
            write_checkpoint(self._storage, self._attempt, files, self._describe, check)
        except Exception as error:
            self.error = error
            logger.error("%s", self._failure())
        else:
            self._committed()
            logger.info("step %d: committed, %.2f s after its copy", self.step, time.perf_counter() - started_at)
        finally:
            # The next save overwrites the memory of these, see `HostMemory`.
            self._snapshots = {}
            self.over.set()

    def _failure(self) -> str:
        assert self.error is not None
        if isinstance(self.error, NonfiniteStateError):
            return (
                f"step {self.step} was NOT saved in {self._storage.root}: {self.error}. A run cannot continue from "
                "that; the same command resumes from the last good checkpoint. optim.nonfinite=skip leaves out "
                "steps whose gradients are not finite (in a script: optimizer.nonfinite = 'skip')."
            )
        needed = ""
        if isinstance(self.error, OSError) and self._num_bytes:  # most often the disk is full
            needed = f" ({self._num_bytes:,} bytes of this rank)"
        return (
            f"step {self.step} was NOT saved in {self._storage.root}: {describe_error(self.error)}{needed}. "
            "Training continues; the last good checkpoint remains."
        )

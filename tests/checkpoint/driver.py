"""One save without torch, to be ended at any point: `python -m tests.checkpoint.driver ROOT STEP [RANK/SIZE] [FAULT]`.

It prints `ACK STEP` when the step is committed. FAULT plants a bug, to prove that the harness would find it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from distopt.checkpoint.commit import Attempt, write_checkpoint
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import CheckedFile, candidates, verify
from distopt.checkpoint.retention import Retention, remove_leftovers, retain
from distopt.checkpoint.storage import posix
from distopt.checkpoint.storage.posix import PosixStorage, PosixWriteStream

TIMEOUT = timedelta(seconds=10)


def names(rank: int) -> Iterator[str]:
    if rank == 0:
        yield from ("replicated.safetensors", "replicated.json.gz")
    yield from (f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json.gz")


def content(step: int, name: str) -> bytes:
    """What a file of a step holds: some tens of kilobytes that no other file holds."""
    return hashlib.sha256(f"{step} {name}".encode()).digest() * 700


def save(root: Path, step: int, rank: int = 0, world_size: int = 1, timeout: timedelta = TIMEOUT) -> None:
    storage = PosixStorage(root)
    attempt = Attempt(step, f"{step:012x}", rank, world_size, timeout)
    with storage.lock() if rank == 0 else nullcontext():
        if rank == 0:
            remove_leftovers(storage)
        files = {name: [memoryview(content(step, name))] for name in names(rank)}
        write_checkpoint(storage, attempt, files, lambda records: Manifest(step, attempt.id, 0, world_size, records))
        print(f"ACK {step}", flush=True)
        failpoint("after_acknowledge", rank)
        if rank == 0:
            retain(storage, Retention(2))


def newest_good(root: Path) -> int:
    """Returns the step that a resuming run would take; its files hold what was saved, whatever happened."""
    storage = PosixStorage(root)
    for one in candidates(storage):
        try:
            manifest = verify(storage, one.folder)
        except CheckpointError:
            continue
        assert set(manifest.files) == {name for rank in range(manifest.world_size) for name in names(rank)}
        for name in manifest.files:
            with CheckedFile(storage, one.folder, name, manifest.files[name], manifest) as file:
                assert file.read(0, file.size) == content(one.step, name), f"{one.folder}/{name} holds something else"
        return one.step
    return -1


def plant(fault: str) -> None:
    if fault == "no-fsync":
        PosixWriteStream.close = PosixWriteStream.abandon
    elif fault == "no-folder-fsync":
        posix._synced = lambda path: nullcontext()
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    position, wait_s = (0, 1), TIMEOUT
    for argument in sys.argv[3:]:
        if "/" in argument:
            rank, size, seconds = argument.split("/")
            position, wait_s = (int(rank), int(size)), timedelta(seconds=float(seconds))
        else:
            plant(argument)
    save(Path(sys.argv[1]), int(sys.argv[2]), *position, wait_s)

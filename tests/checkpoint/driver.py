"""One save without torch, to be ended at any system call: `python -m tests.checkpoint.driver ROOT STEP [FAULT]`.

It prints `ACK STEP` when the step is committed. FAULT plants a bug, to prove that the harness would find it.
"""

from __future__ import annotations

import hashlib
import sys
from datetime import timedelta
from pathlib import Path

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.local import LocalSink, LocalStorage
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import CheckedFile, candidates, verify
from distopt.checkpoint.retention import remove_leftovers, retain
from distopt.checkpoint.writer import Attempt, write_checkpoint

NAMES = ("replicated.safetensors", "replicated.json.gz", "rank-00000.safetensors", "rank-00000.json.gz")


def content(step: int, name: str) -> bytes:
    """What a file of a step holds: some tens of kilobytes that no other file holds."""
    return hashlib.sha256(f"{step} {name}".encode()).digest() * 700


def save(root: Path, step: int) -> None:
    storage = LocalStorage(root)
    storage.lock()
    try:
        remove_leftovers(storage)
        attempt = Attempt(step, f"{step:012x}", 0, 1, timedelta(seconds=10))
        files = {name: [memoryview(content(step, name))] for name in NAMES}
        write_checkpoint(storage, attempt, files, lambda records: Manifest(step, attempt.id, 0, 1, records))
        print(f"ACK {step}", flush=True)
        retain(storage, 2, None)
    finally:
        storage.unlock()


def newest_good(root: Path) -> int:
    """Returns the step that a resuming run would take; its files hold what was saved, whatever happened."""
    storage = LocalStorage(root)
    for one in candidates(storage):
        try:
            manifest = verify(storage, one.folder)
        except CheckpointError:
            continue
        for name in NAMES:
            with CheckedFile(storage, one.folder, name, manifest.files[name], manifest) as file:
                assert file.read(0, file.size) == content(one.step, name), f"{one.folder}/{name} holds something else"
        return one.step
    return -1


def plant(fault: str) -> None:
    if fault == "no-fsync":
        LocalSink.close = LocalSink.abandon
    elif fault == "no-folder-fsync":
        LocalStorage._sync = lambda self, path: None
    else:
        raise ValueError(fault)


if __name__ == "__main__":
    for planted in sys.argv[3:]:
        plant(planted)
    save(Path(sys.argv[1]), int(sys.argv[2]))

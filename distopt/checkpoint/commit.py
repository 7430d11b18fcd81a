"""How a checkpoint gets to disk: all of it or nothing, whatever ends the process, on one rank or many.

    rank 0                                   other ranks
    makes the work folder                    wait for it
    writes its files, hashing; fsync         write theirs, hashing; fsync
    collects the notes, with a deadline <--  leave a note: prepared (sizes, digests) or failed (why)
    checks sizes, writes the manifest
    publishes the folder: the commit    -->  see the manifest of this attempt, sync its name: saved
      or leaves a note: aborted         -->  see the note: not saved

The notes go through the checkpoint's own file system and not through the process group, since a save runs beside
training: collectives of two threads would interleave, and gloo pairs them by order alone.

This module imports no torch, so that a process which only writes starts in a tenth of a second: the tests that end it
at every system call are that quick.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeAlias

from distopt.checkpoint.chunks import read_small, thread_pool, write_file
from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError, describe_error
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.manifest import MAX_MANIFEST_BYTES, FileRecord, Manifest, file_name, seal, unseal
from distopt.checkpoint.storage.base import Storage
from distopt.checkpoint.storage.names import final_folder, work_folder
from distopt.checkpoint.storage.retries import retried
from distopt.run_files import MANIFEST

Files: TypeAlias = Mapping[str, Sequence[memoryview]]
"""By file name, the bytes of a file, in pieces that are written one after the other."""

Describe: TypeAlias = Callable[[dict[str, FileRecord]], Manifest]
"""Makes the manifest of a checkpoint from the records of all its files."""

_FIRST_DELAY_S = 0.002
_LAST_DELAY_S = 0.25

# Names of the notes begin with a dot: they are no files of a checkpoint, and `check_files` does not count them.
_ABORTED = ".aborted.json"


def _prepared(rank: int) -> str:
    return f".prepared-{rank:05d}.json"


def _failed(rank: int) -> str:
    return f".failed-{rank:05d}.json"


@dataclass(frozen=True)
class Attempt:
    """One try at saving one step, as one rank sees it; all ranks agree on all but the rank."""

    step: int
    id: str
    """Unique for each try: 8 to 32 hexadecimal digits."""
    rank: int
    world_size: int
    timeout: timedelta
    """How long a rank waits for the others."""

    def work_folder(self, storage: Storage) -> str:
        """Returns the name of the folder that the attempt is written into."""
        return work_folder(self.step, self.id, rename=storage.commits_by_rename)

    def final_folder(self, storage: Storage) -> str:
        """Returns the name of the folder once it is committed."""
        return final_folder(self.step, self.id, rename=storage.commits_by_rename)


def write_checkpoint(
    storage: Storage, attempt: Attempt, files: Files, describe: Describe, check: Callable[[], None] = lambda: None
) -> None:
    """Writes this rank's files and returns when the whole checkpoint is committed; every rank calls it.

    Args:
        storage: Where to; the same on all ranks.
        attempt: Which try this is.
        files: What this rank writes; names differ between ranks. Buffers must not change until this returns.
        describe: Rank 0 calls it with the records of all ranks' files for the manifest.
        check: Raises when this rank has something that must not be saved; then it is saved by none.

    Raises:
        CheckpointError: The checkpoint was not committed; what was written so far is deleted, earlier ones remain.
        OSError: The same, from this rank's own disk.
    """
    if attempt.rank == 0:
        _lead(storage, attempt, files, describe, check)
    else:
        _follow(storage, attempt, files, check)


# Rank 0.


def _lead(storage: Storage, attempt: Attempt, files: Files, describe: Describe, check: Callable[[], None]) -> None:
    folder = attempt.work_folder(storage)
    storage.make_folder(folder)
    try:
        failpoint("after_begin", 0)
        check()
        records = _write_files(storage, folder, attempt, files)
        failpoint("after_prepare", 0)

        for rank, note in _collect_notes(storage, folder, attempt):
            _merge(records, note, rank)
        failpoint("after_gather", 0)

        # Every rank has synced its files before it left its note, so the manifest never describes what may still be
        # lost. On an object store this write is the commit; where folders are renamed, the rename below is.
        _check_sizes(storage, folder, records)
        _write_small(storage, folder, MANIFEST, describe(records).encode())
        storage.sync_folder(folder)
        failpoint("after_manifest", 0)

        final = attempt.final_folder(storage)
        _set_aside_same_step(storage, folder, final)
        storage.publish(folder, final)
    except BaseException as error:
        _abort(storage, folder, error)
        raise
    failpoint("after_publish", 0)


def _collect_notes(storage: Storage, folder: str, attempt: Attempt) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each other rank and its note; raises when one failed, or when not all have reported in time."""
    missing = set(range(1, attempt.world_size))
    if not missing:
        return
    for _ in _until(attempt.timeout, lambda: f"rank(s) {sorted(missing)} of {attempt.world_size} did not report"):
        names = set(storage.files(folder))
        for rank in sorted(missing):
            if _failed(rank) in names:
                cause = (_read_note(storage, folder, _failed(rank)) or {}).get("error", "unknown cause; see its log")
                raise CheckpointError(f"rank {rank} of {attempt.world_size}: {cause}")
            note = _read_note(storage, folder, _prepared(rank)) if _prepared(rank) in names else None
            if note is not None:
                missing.discard(rank)
                storage.remove_file(folder, _prepared(rank))
                yield rank, note
        if not missing:
            return


def _merge(records: dict[str, FileRecord], note: Mapping[str, object], rank: int) -> None:
    files = note["files"]
    assert isinstance(files, dict)
    for name, record in files.items():
        if name in records:
            raise CheckpointError(f"rank {rank} wrote {name}, which another rank has also written.")
        records[file_name(name)] = FileRecord.from_json(record)


def _check_sizes(storage: Storage, folder: str, records: Mapping[str, FileRecord]) -> None:
    for name, record in records.items():
        stream = storage.open(folder, name)
        stream.close()
        if stream.size != record.size:
            raise CheckpointError(
                f"{storage.root}/{folder}/{name} has {stream.size:,} bytes, but {record.size:,} were written."
            )


def _set_aside_same_step(storage: Storage, folder: str, final: str) -> None:
    """Sets aside a checkpoint of the same step: the run reached it again from an older one."""
    if final != folder and final in storage.folders():
        storage.set_aside(final)
        failpoint("after_set_aside", 0)


def _abort(storage: Storage, folder: str, error: BaseException) -> None:
    """Frees the disk and tells the other ranks, as far as the disk still allows it.

    The manifest goes first, and if it does not go, all stays: its writing may have succeeded although it raised.
    """
    with contextlib.suppress(OSError):
        storage.remove_file(folder, MANIFEST)
        for name in storage.files(folder):
            storage.remove_file(folder, name)
        _write_small(storage, folder, _ABORTED, seal({"error": describe_error(error)}))


# The other ranks.


def _follow(storage: Storage, attempt: Attempt, files: Files, check: Callable[[], None]) -> None:
    folder = attempt.work_folder(storage)
    try:
        for _ in _until(attempt.timeout, f"rank 0 did not make {storage.root}/{folder}"):
            if _has_folder(storage, folder):
                break
        failpoint("after_begin", attempt.rank)

        check()
        records = _write_files(storage, folder, attempt, files)
        storage.sync_folder(folder)  # rank 0 does so when the manifest is there
        note = {"files": {name: record.as_json() for name, record in records.items()}}
        _write_small(storage, folder, _prepared(attempt.rank), seal(note))
    except BaseException as error:
        # The files go first, since a full disk has no space for the note either.
        for name in files:
            with contextlib.suppress(OSError):
                storage.remove_file(folder, name)
        with contextlib.suppress(OSError):
            _write_small(storage, folder, _failed(attempt.rank), seal({"error": describe_error(error)}))
        raise
    failpoint("after_prepare", attempt.rank)
    _await_outcome(storage, folder, attempt)


def _await_outcome(storage: Storage, folder: str, attempt: Attempt) -> None:
    """Returns when rank 0 has committed the attempt; raises when it has not.

    A renamed folder is gone under its old name, and so is one that was deleted. So whether it is gone is asked before
    whether it is committed: gone and not committed then means deleted, and not renamed in between.
    """
    final = attempt.final_folder(storage)
    for _ in _until(2 * attempt.timeout, f"rank 0 neither committed nor aborted {storage.root}/{folder}"):
        try:
            gone = not _has_folder(storage, folder)
            committed = _is_committed(storage, final, attempt)
        except OSError:
            continue  # neither is known, so it is asked again
        if committed:
            storage.sync_folder("")  # rank 0 may not have come to it yet
            return
        note = None if gone else _read_note(storage, folder, _ABORTED)
        if note is not None:
            raise CheckpointError(f"rank 0 gave up: {note.get('error')}")
        if gone:
            raise CheckpointError("rank 0 gave up; see its log for the cause")


def _has_folder(storage: Storage, folder: str) -> bool:
    try:
        storage.files(folder)
    except FileNotFoundError:
        return False
    return True


def _is_committed(storage: Storage, final: str, attempt: Attempt) -> bool:
    """Returns whether the manifest is that of this attempt; an OSError when that cannot be read."""
    try:
        raw = read_small(storage, final, MANIFEST, MAX_MANIFEST_BYTES)
        return Manifest.decode(raw, final).attempt == attempt.id
    except (FileNotFoundError, CorruptCheckpointError):
        return False


# Both.


def _write_files(storage: Storage, folder: str, attempt: Attempt, files: Files) -> dict[str, FileRecord]:
    """Writes this rank's files; returns their records by name."""
    with thread_pool() as pool:
        records = {file_name(name): _write_again(storage, folder, name, pieces, pool) for name, pieces in files.items()}
    failpoint("after_write", attempt.rank)
    return records


def _write_again(
    storage: Storage, folder: str, name: str, pieces: Sequence[memoryview], pool: ThreadPoolExecutor
) -> FileRecord:
    """Writes a file; after an error that may pass, all of it again under the same name.

    A new file, and not the rest of the old one: after an error nobody knows which of its bytes the disk has.
    """
    return retried(
        lambda: write_file(storage.create(folder, name), pieces, pool), lambda: storage.remove_file(folder, name)
    )


def _write_small(storage: Storage, folder: str, name: str, raw: bytes) -> None:
    with ThreadPoolExecutor(1) as pool:  # starts no thread for so little
        _write_again(storage, folder, name, [memoryview(raw)], pool)


def _read_note(storage: Storage, folder: str, name: str) -> dict[str, object] | None:
    """Returns a note, None while it is not there or incomplete."""
    try:
        return unseal(read_small(storage, folder, name, MAX_MANIFEST_BYTES), name)
    except (OSError, CorruptCheckpointError):
        return None


def _until(timeout: timedelta, what: str | Callable[[], str]) -> Iterator[None]:
    """Yields at growing intervals until `timeout` has passed, then raises `CheckpointError` saying `what`.

    They start at 2 ms, since small checkpoints are that quick, and end at 250 ms, since file servers have other work.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    delay = _FIRST_DELAY_S
    while True:
        yield
        if time.monotonic() > deadline:
            raise CheckpointError(f"{what if isinstance(what, str) else what()} within {timeout.total_seconds():g} s")
        time.sleep(delay)
        delay = min(delay * 1.5, _LAST_DELAY_S)

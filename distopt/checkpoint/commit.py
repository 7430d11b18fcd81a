"""How a checkpoint gets to disk: all of it or nothing, whatever ends the process, on one rank or many.

    rank 0                                   other ranks
    makes the work folder                    wait for it
    writes its files, hashing; fsync         write theirs, hashing; fsync
    gathers the notes, with a deadline  <--  leave a note: prepared (sizes, digests) or failed (why)
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
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import xxhash

from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.manifest import (
    CHUNK_BYTES,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    file_name,
    seal,
    unseal,
)
from distopt.checkpoint.storage.base import Sink, Storage

Files = Mapping[str, Iterable[memoryview]]
"""File name → its bytes, in pieces that are written one after the other."""

ABORTED = ".aborted.json"
SMALL_BYTES = 1 << 20
"""What is hashed at once, since handing it to a thread would take longer."""
_FIRST_DELAY_S, _LAST_DELAY_S = 0.002, 0.25


@dataclass(frozen=True)
class Attempt:
    """One try at saving one step, as one rank sees it; all ranks agree on all but the rank."""

    step: int
    id: str
    rank: int
    world_size: int
    timeout: timedelta


def write_checkpoint(
    storage: Storage, attempt: Attempt, files: Files, describe: Callable[[dict[str, FileRecord]], Manifest]
) -> None:
    """Writes this rank's files and returns when the whole checkpoint is committed; every rank calls it.

    Args:
        storage: where to; on all ranks the same place.
        attempt: which try this is.
        files: what this rank writes; names differ between ranks. Buffers must not change until it returns.
        describe: rank 0 calls it with the records of all ranks' files for the manifest.

    Raises:
        CheckpointError: the checkpoint was not committed; what was written so far is deleted, earlier ones stand.
        OSError: the same, from this rank's own disk.
    """
    if attempt.rank == 0:
        _lead(storage, attempt, files, describe)
    else:
        _follow(storage, attempt, files)


def write_file(sink: Sink, pieces: Iterable[memoryview], pool: ThreadPoolExecutor) -> FileRecord:
    """Writes `pieces` and hashes them meanwhile in `pool`; returns when they are safe."""
    digests: list[Future[str]] = []
    size = 0
    try:
        for _, chunk in by_chunk(pieces):
            length = sum(map(len, chunk))
            digests.append(pool.submit(chunk_digest, chunk) if length > SMALL_BYTES else _done(chunk_digest(chunk)))
            sink.write(chunk)
            size += length
        sink.close()
    except BaseException:
        sink.abandon()
        raise
    return FileRecord(size, tuple(digest.result() for digest in digests))


def _done(digest: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(digest)
    return future


def chunk_digest(pieces: Sequence[memoryview]) -> str:
    """Returns the XXH3-128 of all pieces together, in hexadecimal; one large piece lets other threads run meanwhile."""
    if len(pieces) == 1:
        return xxhash.xxh3_128_hexdigest(pieces[0])
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def thread_pool() -> ThreadPoolExecutor:
    """Returns threads enough to copy and hash as fast as disks write, and few enough to leave training its cores."""
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1))


def _lead(
    storage: Storage, attempt: Attempt, files: Files, describe: Callable[[dict[str, FileRecord]], Manifest]
) -> None:
    folder = storage.begin(attempt.step, attempt.id)
    try:
        failpoint("after_begin", 0)
        records = _write_own(storage, folder, attempt, files)
        failpoint("after_prepare", 0)
        for rank, note in _gather(storage, folder, attempt):
            _merge(records, note, rank)
        failpoint("after_gather", 0)
        _check_sizes(storage, folder, records)
        sink = storage.create(folder, MANIFEST)
        with thread_pool() as pool:
            write_file(sink, [memoryview(describe(records).encode())], pool)
        storage.sync_folder(folder)
        failpoint("after_manifest", 0)
        _make_room(storage, attempt)
        storage.publish(folder, attempt.step)
    except BaseException as error:
        _abort(storage, folder, error)
        raise
    failpoint("after_publish", 0)


def _follow(storage: Storage, attempt: Attempt, files: Files) -> None:
    folder = storage.work_folder(attempt.step, attempt.id)
    try:
        for _ in _until(attempt.timeout, f"rank 0 did not make {storage.root}/{folder}"):
            if storage.has_folder(folder):
                break
        failpoint("after_begin", attempt.rank)
        records = _write_own(storage, folder, attempt, files)
        storage.sync_folder(folder)  # rank 0 does so once the manifest is there
        note = {"files": {name: record.as_json() for name, record in records.items()}}
        _leave_note(storage, folder, f".prepared-{attempt.rank:05d}.json", note)
    except BaseException as error:
        for name in files:
            with contextlib.suppress(OSError):
                storage.remove_file(folder, name)  # first, since a full disk has no room for the note either
        with contextlib.suppress(OSError):
            _leave_note(storage, folder, f".failed-{attempt.rank:05d}.json", {"error": describe_error(error)})
        raise
    failpoint("after_prepare", attempt.rank)
    _await_outcome(storage, folder, attempt)


def _write_own(storage: Storage, folder: str, attempt: Attempt, files: Files) -> dict[str, FileRecord]:
    with thread_pool() as pool:
        records = {
            file_name(name): write_file(storage.create(folder, name), pieces, pool) for name, pieces in files.items()
        }
    failpoint("after_write", attempt.rank)
    return records


def _gather(storage: Storage, folder: str, attempt: Attempt) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each other rank and its note; raises when one failed, or when not all have come in time."""
    missing = set(range(1, attempt.world_size))
    if not missing:
        return
    waiting = _until(attempt.timeout, lambda: f"no word from rank(s) {sorted(missing)} of {attempt.world_size}")
    for _ in waiting:
        names = set(storage.files(folder))
        for rank in sorted(missing):
            failed, prepared = f".failed-{rank:05d}.json", f".prepared-{rank:05d}.json"
            if failed in names:
                cause = (_read_note(storage, folder, failed) or {}).get("error", "no room to say why; see its log")
                raise CheckpointError(f"rank {rank} of {attempt.world_size}: {cause}")
            note = _read_note(storage, folder, prepared) if prepared in names else None
            if note is not None:
                missing.discard(rank)
                storage.remove_file(folder, prepared)
                yield rank, note
        if not missing:
            return


def _merge(records: dict[str, FileRecord], note: Mapping[str, object], rank: int) -> None:
    files = note["files"]
    assert isinstance(files, dict)
    for name, record in files.items():
        if name in records:
            raise CheckpointError(f"rank {rank} wrote {name}, which another rank has written too.")
        records[file_name(name)] = FileRecord.from_json(record)


def _check_sizes(storage: Storage, folder: str, records: Mapping[str, FileRecord]) -> None:
    for name, record in records.items():
        source = storage.open(folder, name)
        source.close()
        if source.size != record.size:
            raise CheckpointError(f"{storage.root}/{folder}/{name}: {source.size:,} bytes, written {record.size:,}.")


def _make_room(storage: Storage, attempt: Attempt) -> None:
    """Sets aside a checkpoint of this very step: the run came here again from an older one."""
    final = storage.final_folder(attempt.step, attempt.id)
    if final != storage.work_folder(attempt.step, attempt.id) and final in storage.folders():
        storage.set_aside(final)
        failpoint("after_set_aside", 0)


def _abort(storage: Storage, folder: str, error: BaseException) -> None:
    """Frees the disk and tells the other ranks, as far as the disk still lets us."""
    with contextlib.suppress(OSError):
        for name in storage.files(folder):
            storage.remove_file(folder, name)
        _leave_note(storage, folder, ABORTED, {"error": describe_error(error)})


def _await_outcome(storage: Storage, folder: str, attempt: Attempt) -> None:
    final = storage.final_folder(attempt.step, attempt.id)
    for _ in _until(2 * attempt.timeout, f"rank 0 neither committed nor aborted {storage.root}/{folder}"):
        gone = not storage.has_folder(folder)
        if _is_committed(storage, final, attempt):
            storage.sync_folder("")  # rank 0 may not have come to it yet
            return
        note = None if gone else _read_note(storage, folder, ABORTED)
        if note is not None:
            raise CheckpointError(f"rank 0 gave up: {note.get('error')}")
        if gone:
            raise CheckpointError("rank 0 gave up; its log says why")


def _is_committed(storage: Storage, final: str, attempt: Attempt) -> bool:
    try:
        raw = read_small(storage, final, MANIFEST, MAX_MANIFEST_BYTES)
        return Manifest.decode(raw, final).attempt == attempt.id
    except (OSError, CorruptCheckpointError):
        return False


def read_small(storage: Storage, folder: str, name: str, most_bytes: int) -> bytes:
    """Returns all bytes of a file.

    Raises:
        OSError: when there is no such regular file.
        CorruptCheckpointError: when it has more than `most_bytes`.
    """
    source = storage.open(folder, name)
    try:
        if source.size > most_bytes:
            raise CorruptCheckpointError(
                f"{storage.root}/{folder}/{name}: {source.size:,} bytes, limit {most_bytes:,}."
            )
        raw = bytearray(source.size)
        source.read_into(0, [memoryview(raw)])
        return bytes(raw)
    except EOFError as error:
        raise CorruptCheckpointError(f"{error}.") from error
    finally:
        source.close()


def describe_error(error: BaseException) -> str:
    """Returns one line: the error's own words, with its type where these alone say little."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _leave_note(storage: Storage, folder: str, name: str, body: Mapping[str, object]) -> None:
    sink = storage.create(folder, name)
    try:
        sink.write([memoryview(seal(body))])
        sink.close()
    except BaseException:
        sink.abandon()
        raise


def _read_note(storage: Storage, folder: str, name: str) -> dict[str, object] | None:
    """Returns a note, None while it is not there or half written."""
    try:
        return unseal(read_small(storage, folder, name, MAX_MANIFEST_BYTES), name)
    except (OSError, CorruptCheckpointError):
        return None


def _until(timeout: timedelta, what: str | Callable[[], str]) -> Iterator[None]:
    """Yields at growing intervals until `timeout` has passed, then raises `CheckpointError` saying `what`."""
    end = time.monotonic() + timeout.total_seconds()
    delay = _FIRST_DELAY_S
    while True:
        yield
        if time.monotonic() > end:
            raise CheckpointError(f"{what if isinstance(what, str) else what()} within {timeout.total_seconds():g} s")
        time.sleep(delay)
        delay = min(delay * 1.5, _LAST_DELAY_S)


def by_chunk(pieces: Iterable[memoryview], offset: int = 0) -> Iterator[tuple[int, list[memoryview]]]:
    """Yields (chunk number, what lies in it) for pieces that follow each other in a file from `offset` on."""
    index, inside = divmod(offset, CHUNK_BYTES)
    room = CHUNK_BYTES - inside
    chunk: list[memoryview] = []
    for piece in pieces:
        rest = piece.cast("B")
        while len(rest) >= room:
            yield index, [*chunk, rest[:room]]
            rest, chunk, room, index = rest[room:], [], CHUNK_BYTES, index + 1
        if len(rest):
            chunk.append(rest)
            room -= len(rest)
    if chunk:
        yield index, chunk

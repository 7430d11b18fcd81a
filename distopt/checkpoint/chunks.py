"""Files in chunks: written and hashed at the same time, in threads.

A file is hashed in chunks of `CHUNK_BYTES`, each by itself, so that several threads can hash one file and a few rows of
a tensor can be checked without the rest of it. This module imports no torch, see `commit`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import xxhash

from distopt.cgroups import available_cores
from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.checkpoint.manifest import CHUNK_BYTES, FileRecord
from distopt.checkpoint.storage.base import Storage, WriteStream

SMALL_BYTES = 1 << 20
"""Up to this size a chunk is hashed at once, since handing it to a thread would take longer."""


def thread_pool() -> ThreadPoolExecutor:
    """Returns enough threads to copy and hash as fast as disks write, few enough to leave training its cores."""
    return ThreadPoolExecutor(min(4, available_cores()))


def by_chunk(pieces: Iterable[memoryview], offset: int = 0) -> Iterator[tuple[int, list[memoryview]]]:
    """Yields (number of the chunk, what lies in it) for pieces that follow each other in a file.

    Args:
        pieces: Of contiguous memory, of any item type; they are cut where a chunk ends, and never copied.
        offset: Of the first byte in the file. The first and last chunk may be incomplete.

    Example:
        >>> [(index, sum(map(len, chunk))) for index, chunk in by_chunk([memoryview(bytes(10 << 20))])]
        [(0, 8388608), (1, 2097152)]
    """
    # `space` is what is left of the current chunk, `chunk` what has been put into it so far. A piece that reaches
    # beyond its end is cut as often as needed; slices of a memoryview copy nothing.
    index, inside = divmod(offset, CHUNK_BYTES)
    space = CHUNK_BYTES - inside
    chunk: list[memoryview] = []
    for piece in pieces:
        rest = piece.cast("B")
        while len(rest) >= space:
            yield index, [*chunk, rest[:space]]
            rest = rest[space:]
            chunk = []
            space = CHUNK_BYTES
            index += 1
        if len(rest):
            chunk.append(rest)
            space -= len(rest)
    if chunk:
        yield index, chunk


def chunk_digest(pieces: Sequence[memoryview]) -> str:
    """Returns the XXH3-128 of all pieces together, in hexadecimal; a large piece lets other threads run meanwhile."""
    if len(pieces) == 1:
        return xxhash.xxh3_128_hexdigest(pieces[0])
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def write_file(stream: WriteStream, pieces: Iterable[memoryview], pool: ThreadPoolExecutor) -> FileRecord:
    """Writes `pieces` and hashes them meanwhile in `pool`; returns when they are safe.

    Args:
        stream: Where to; closed afterwards, or abandoned after an error.
        pieces: The bytes of the file; they must not change until this returns.
        pool: Threads for hashing, which overlaps with the writing.
    """
    # This thread writes a chunk while others hash the ones before it, so hashing costs no time where there is more than
    # one core. The results are collected at the end, in the order of the chunks.
    digests: list[Future[str]] = []
    size = 0
    try:
        for _, chunk in by_chunk(pieces):
            length = sum(map(len, chunk))
            digests.append(pool.submit(chunk_digest, chunk) if length > SMALL_BYTES else _done(chunk_digest(chunk)))
            stream.write(chunk)
            size += length
        stream.close()
    except BaseException:
        stream.abandon()
        raise
    return FileRecord(size, tuple(digest.result() for digest in digests))


def _done(digest: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(digest)
    return future


def read_small(storage: Storage, folder: str, name: str, max_bytes: int) -> bytes:
    """Returns all bytes of a small file.

    Raises:
        OSError: There is no such regular file.
        CorruptCheckpointError: It has more than `max_bytes`, or fewer than its size says.
    """
    stream = storage.open(folder, name)
    try:
        if stream.size > max_bytes:
            raise CorruptCheckpointError(f"{storage.root}/{folder}/{name}: {stream.size:,} bytes, limit {max_bytes:,}.")
        raw = bytearray(stream.size)
        stream.read_into(0, [memoryview(raw)])
        return bytes(raw)
    except EOFError as error:
        raise CorruptCheckpointError(f"{error}.") from error
    finally:
        stream.close()

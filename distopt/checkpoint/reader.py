"""How a checkpoint is found and read: every byte is checked against its digest before it is used.

There is no way around the check: whatever reads a file of a checkpoint does so through `CheckedFile`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import xxhash

from distopt.checkpoint import tensorfile
from distopt.checkpoint.chunks import by_chunk, read_small, thread_pool
from distopt.checkpoint.errors import CorruptCheckpointError, UnreadableCheckpointError
from distopt.checkpoint.manifest import CHUNK_BYTES, MAX_MANIFEST_BYTES, FileRecord, Manifest
from distopt.checkpoint.storage.base import ReadStream, Storage
from distopt.run_files import MANIFEST, step_of

_CACHED_BYTES = 512 << 10
"""What is read at a time: it is hashed while it is still in the processor's cache."""

# Only these errors prove that a file is not the one that was written: it is missing, or something else is in its place
# (a folder, a link, a pipe, a socket). After all others it may be whole.
_PROOFS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO})
_PROOF_KINDS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Raises errors of the body as what they say about a file.

    Args:
        where: The file, for the message.

    Raises:
        CorruptCheckpointError: It is not what was written.
        UnreadableCheckpointError: It may be, and cannot be read now.
    """
    try:
        yield
    except EOFError as error:
        raise CorruptCheckpointError(f"{where}: {error}.") from error
    except OSError as error:
        if isinstance(error, _PROOF_KINDS) or error.errno in _PROOFS:
            raise CorruptCheckpointError(f"{where}: {error}.") from error
        raise UnreadableCheckpointError(
            f"{where}: {error}. It cannot be read, which does not mean that it is damaged: nothing is deleted or "
            "replaced. When the disk or network works again, run the same command to resume."
        ) from error


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a checkpoint: its manifest, or why there is none."""

    folder: str
    step: int
    manifest: Manifest | None
    error: str = ""
    is_unreadable: bool = False
    """Whether the manifest could not be read; without one it is damaged otherwise."""

    @property
    def age(self) -> tuple[float, int]:
        """Sorts by (generation, step); one without manifest counts as of the newest, so that it is reported."""
        return (self.manifest.generation if self.manifest else float("inf"), self.step)


def candidates(storage: Storage) -> list[Candidate]:
    """Returns what may be a checkpoint, newest first."""
    read = [_candidate(storage, folder, step_of(folder)) for folder in storage.folders()]
    return sorted((each for each in read if each is not None), key=lambda each: each.age, reverse=True)


def known_manifests(storage: Storage) -> list[Manifest]:
    """Returns the manifests of all checkpoints that are not damaged, newest first.

    Raises:
        UnreadableCheckpointError: One cannot be read, so that nobody knows which is the newest.
    """
    listed = candidates(storage)
    for each in listed:
        if each.is_unreadable:
            raise UnreadableCheckpointError(each.error)
    return [each.manifest for each in listed if each.manifest is not None]


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """Returns the manifest of one folder.

    Raises:
        CorruptCheckpointError: It is not whole, or of another step than the folder.
        UnreadableCheckpointError: It cannot be read.
    """
    where = f"{storage.root}/{folder}/{MANIFEST}"
    with reading(where):
        raw = read_small(storage, folder, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = Manifest.decode(raw, where)
    if manifest.step != step_of(folder) and step_of(folder) is not None:
        raise CorruptCheckpointError(f"{where} is of step {manifest.step}, the folder's name says {step_of(folder)}.")
    return manifest


def _candidate(storage: Storage, folder: str, step: int | None) -> Candidate | None:
    """Returns what a folder is, None when it is no checkpoint and never was one."""
    if step is None:
        return None
    try:
        return Candidate(folder, step, read_manifest(storage, folder))
    except UnreadableCheckpointError as error:
        return Candidate(folder, step, None, str(error), is_unreadable=True)
    except CorruptCheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            return Candidate(folder, step, None, str(error))
        if not storage.commits_by_rename:
            return None  # an attempt that was never committed
        return Candidate(folder, step, None, f"{storage.root}/{folder}: {MANIFEST} is missing.")


def check_files(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Compares the folder's list of files and their sizes with the manifest; reads no data.

    Raises:
        CorruptCheckpointError: Naming the first file that is missing, surplus or of another size.
        UnreadableCheckpointError: A file or the folder cannot be read.
    """
    with reading(f"{storage.root}/{folder}"):
        present = {name for name in storage.files(folder) if not name.startswith(".")} - {MANIFEST}
    for name in sorted(manifest.files.keys() - present):
        raise CorruptCheckpointError(f"{storage.root}/{folder}: {name} is missing.")
    for name in sorted(present - manifest.files.keys()):
        raise CorruptCheckpointError(f"{storage.root}/{folder}: {name} is not in its manifest.")
    # Opening a file compares its size, and finds links and pipes in place of files.
    for name, record in manifest.files.items():
        CheckedFile(storage, folder, name, record, manifest).close()


def verify(storage: Storage, folder: str, names: Iterable[str] | None = None) -> Manifest:
    """Reads every byte of a checkpoint (or of the files in `names`) and compares it with the manifest.

    Raises:
        CorruptCheckpointError: Naming the first file that differs, and where.
        UnreadableCheckpointError: Naming the first file that cannot be read.
    """
    manifest = read_manifest(storage, folder)
    check_files(storage, folder, manifest)
    for name in manifest.files if names is None else names:
        with CheckedFile(storage, folder, name, manifest.files[name], manifest) as file, thread_pool() as pool:
            file.check_all(pool)
    return manifest


class CheckedFile:
    """One file of a checkpoint: what is read from it is what was written, or an error is raised.

    Args:
        storage: Where the checkpoint is.
        folder: Its folder.
        name: The file's name.
        record: What the manifest says of the file.
        manifest: The manifest, for messages.

    Raises:
        CorruptCheckpointError: The file is missing, no regular one, or has another size.
        UnreadableCheckpointError: It cannot be opened.
    """

    def __init__(self, storage: Storage, folder: str, name: str, record: FileRecord, manifest: Manifest) -> None:
        self._where = f"{storage.root}/{folder}/{name}"
        self._record = record
        self._manifest = manifest
        self._cached: tuple[int, bytearray] = (-1, bytearray())  # the chunk read last: its neighbours often follow
        with reading(self._where):
            self._stream: ReadStream = storage.open(folder, name)
        self.size = record.size
        if self._stream.size != record.size:
            self._stream.close()
            raise CorruptCheckpointError(
                f"{self._where} has {self._stream.size:,} bytes, its manifest says {record.size:,}."
            )

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file."""
        self._stream.close()

    def read(self, offset: int, count: int) -> bytes:
        """Returns `count` checked bytes from `offset` on."""
        raw = bytearray(count)
        with ThreadPoolExecutor(1) as pool:
            self.read_into(offset, [memoryview(raw)], pool)
        return bytes(raw)

    def read_into(self, offset: int, pieces: Sequence[memoryview], pool: ThreadPoolExecutor) -> None:
        """Fills the pieces, in order, with the bytes from `offset` on; chunks are read and hashed in parallel.

        Chunks that lie wholly inside go straight into the pieces. One at the border is read as a whole, since its
        digest is of all its bytes.

        Raises:
            CorruptCheckpointError: A byte that was read, or another one of its chunk, is not what was written.
            UnreadableCheckpointError: The disk or network does not hand them out.
        """
        # `whole` is read by the pool below, straight into its final memory. What is incomplete is copied from a cached
        # chunk: rows of a tensor that are read one after the other often share their border.
        whole = []
        position = offset
        for index, chunk in by_chunk(pieces, offset):
            length = sum(map(len, chunk))
            if length == self._chunk_size(index):
                whole.append((index, chunk))
            else:
                self._copy_from(index, position - index * CHUNK_BYTES, chunk)
            position += length

        if len(whole) == 1:
            self._read_chunk(*whole[0])
        else:
            list(pool.map(lambda job: self._read_chunk(*job), whole))

    def check_all(self, pool: ThreadPoolExecutor) -> None:
        """Reads and checks every byte, holding a few chunks at a time."""
        if len(self._record.chunks) == 1:
            self._load_chunk(0)
        else:
            list(pool.map(self._check_chunk, range(len(self._record.chunks))))

    def header(self) -> tuple[dict[str, tensorfile.Entry], dict[str, str]]:
        """Returns the tensors and metadata of a safetensors file."""
        try:
            length = tensorfile.header_bytes(self.read(0, min(8, self.size)), self.size)
            return tensorfile.decode_header(self.read(0, length), self.size)
        except ValueError as error:
            raise CorruptCheckpointError(f"{self._where}: {error}.") from error

    def _chunk_size(self, index: int) -> int:
        return min(CHUNK_BYTES, self.size - index * CHUNK_BYTES)

    def _check_chunk(self, index: int) -> None:
        self._load_chunk(index)  # without returning its bytes, which would pile up in the results

    def _load_chunk(self, index: int) -> bytearray:
        raw = bytearray(self._chunk_size(index))
        self._read_chunk(index, [memoryview(raw)])
        return raw

    def _copy_from(self, index: int, start: int, pieces: Sequence[memoryview]) -> None:
        if self._cached[0] != index:
            self._cached = (index, self._load_chunk(index))
        view = memoryview(self._cached[1])[start:]
        for piece in pieces:
            piece[:] = view[: len(piece)]
            view = view[len(piece) :]

    def _read_chunk(self, index: int, pieces: Sequence[memoryview]) -> None:
        digest = xxhash.xxh3_128()
        offset = index * CHUNK_BYTES
        with reading(self._where):
            for piece in pieces:
                # Read and hashed half a megabyte at a time: memory is then passed over once, not twice.
                for start in range(0, len(piece), _CACHED_BYTES):
                    segment = piece[start : start + _CACHED_BYTES]
                    self._stream.read_into(offset, [segment])
                    digest.update(segment)
                    offset += len(segment)

        if digest.hexdigest() != self._record.chunks[index]:
            start = index * CHUNK_BYTES
            raise CorruptCheckpointError(
                f"{self._where}: bytes {start:,} to {start + self._chunk_size(index):,} are not those that were written"
                f"{self._other_step()}."
            )

    def _other_step(self) -> str:
        """Returns a remark if the file is that of another checkpoint; the unchecked header is used for nothing else."""
        try:
            raw = bytearray(min(self.size, 4096))
            self._stream.read_into(0, [memoryview(raw)])
            start = raw.index(b'{"step":"') + len(b'{"step":"')
            step = int(raw[start : raw.index(b'"', start)])
        except (OSError, EOFError, ValueError):
            return ""
        return f" (the file is of step {step}, the manifest of step {self._manifest.step})" * (
            step != self._manifest.step
        )

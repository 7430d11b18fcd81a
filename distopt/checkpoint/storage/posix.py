"""Checkpoints on a local or shared disk: fsync before rename, so that a power failure leaves all of it or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

from distopt.checkpoint.errors import CheckpointError, DirectoryInUseError
from distopt.checkpoint.storage.base import ReadStream, Storage, SyncError, WriteStream, new_token
from distopt.checkpoint.storage.names import LOCK, doomed_folder
from distopt.run_files import step_of

_SENT_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # only Linux has it
_MAX_PIECES = 512  # below every system's limit for one writev or preadv (IOV_MAX is 1024 on Linux)


class PosixStorage(Storage):
    """A directory, used through the calls of POSIX.

    On several machines it must be on a file system that all of them share.

    Args:
        root: The directory; made when it is first written to.
    """

    commits_by_rename = True

    def __init__(self, root: Path) -> None:
        self.path = root.absolute()  # so that it stays the same when the script changes its working directory
        self.root = str(self.path)

    def create(self, folder: str, name: str) -> PosixWriteStream:
        """Opens with O_EXCL: never over another file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return PosixWriteStream(os.open(self.path / folder / name, flags, 0o600))

    def open(self, folder: str, name: str) -> PosixReadStream:
        """Opens without following links, and without waiting for the writer of a pipe."""
        nofollow = os.O_NOFOLLOW if folder else 0  # the root itself may be a link
        parent = os.open(self.path / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | nofollow)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
        return PosixReadStream(fd, f"{self.root}/{folder}/{name}")

    def remove_file(self, folder: str, name: str) -> None:
        """Unlinks."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / folder / name)

    def files(self, folder: str) -> list[str]:
        """Lists the folder."""
        return sorted(os.listdir(self.path / folder))

    def folders(self) -> list[str]:
        """Lists the directory, links included: what is wrong with one is found when it is opened."""
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def remove(self, folder: str) -> None:
        """Deletes recursively; never a folder with the name of a checkpoint."""
        if step_of(folder) is not None:
            raise CheckpointError(f"{self.root}/{folder}: set it aside before removing it.")
        shutil.rmtree(self.path / folder)

    def make_folder(self, folder: str) -> None:
        """Makes a folder, which a power failure may undo until it is published."""
        os.mkdir(self.path / folder, 0o700)

    def sync_folder(self, folder: str) -> None:
        """Syncs the folder's own data: the names in it."""
        with _synced(self.path / folder):
            pass

    def publish(self, folder: str, final: str) -> None:
        """Renames, then syncs the parent: only then is the new name sure to be there after a power failure."""
        # rename would silently replace an empty folder; the lock keeps other jobs from making one in between.
        if (self.path / final).exists():
            raise FileExistsError(errno.EEXIST, "there is a checkpoint of that step", str(self.path / final))
        with _synced(self.path):
            os.rename(self.path / folder, self.path / final)

    def set_aside(self, folder: str) -> str:
        """Renames to the name of a leftover, and syncs that."""
        doomed = doomed_folder(folder)
        with _synced(self.path):
            os.rename(self.path / folder, self.path / doomed)
        return doomed

    def check_writable(self) -> None:
        """Makes a file without a name: ranks of several hosts may share process ids, and rank 0 clears leftovers."""
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".probe-", dir=self.path):
            pass

    def lock(self) -> AbstractContextManager[str]:
        """Takes `.lock`, which the kernel frees when the process ends, however it ends."""
        return _PosixLock(self.path)


@contextmanager
def _synced(path: Path) -> Iterator[None]:
    """Syncs a folder after the body, which changes names in it.

    The folder is opened before: if that fails nothing has been changed, and the whole can be tried again.

    Raises:
        SyncError: The body's changes may be lost.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield
        try:
            os.fsync(fd)
        except OSError as error:
            raise SyncError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


class _PosixLock(AbstractContextManager[str]):
    """The lock of one directory: an exclusive `flock`, and a token in the locked file.

    A plain descriptor and no generator: a lock that is dropped without being left stays locked until the process ends,
    since a thread may still be writing. The file stays as well; deleting it would race with another job's opening it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> str:
        self._path.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise DirectoryInUseError(
                f"{self._path}: another job writes its checkpoints here (its lock says: {holder}). "
                "Stop it, or give this run another run_dir."
            ) from None
        except OSError:
            os.close(fd)
            raise

        self._fd = fd
        token = new_token()
        os.ftruncate(fd, 0)
        os.pwrite(fd, token.encode(), 0)
        return token

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1


class PosixWriteStream(WriteStream):
    """A new file on disk. After any error it is abandoned: a second fsync could report success for lost pages.

    Args:
        fd: Open for writing; this object closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._written = 0
        self._sent = 0

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Writes all bytes, however few the system takes at a time, and has the disk start on them."""
        queue = [piece for piece in pieces if len(piece)]
        while queue:
            written = os.writev(self._fd, queue[:_MAX_PIECES])
            queue = _after(queue, written)
            self._written += written

        # The kernel would leave the disk idle until fsync. This starts the transfer of what has been written so far and
        # waits for nothing; whether the disk has taken it is for fsync to say.
        if self._written - self._sent >= _SENT_BYTES and _sync_file_range is not None:
            start = ctypes.c_int64(self._sent)
            length = ctypes.c_int64(self._written - self._sent)
            _sync_file_range(self._fd, start, length, _SYNC_FILE_RANGE_WRITE)
            self._sent = self._written

    def close(self) -> None:
        """Syncs and closes; both may report an error of an earlier write."""
        fd, self._fd = self._fd, -1
        try:
            os.fsync(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)

    def abandon(self) -> None:
        """Closes without syncing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


class PosixReadStream(ReadStream):
    """A regular file on disk.

    Args:
        fd: Open for reading; this object closes it.
        path: Of the file, for errors.

    Raises:
        OSError: It is a folder, a pipe or a device.
    """

    def __init__(self, fd: int, path: str) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", path)
        self._fd = fd
        self._path = path
        self.size = status.st_size

    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Reads at an offset, so that several threads can share the file."""
        queue = [piece for piece in pieces if len(piece)]
        while queue:
            count = os.preadv(self._fd, queue[:_MAX_PIECES], offset)
            if count == 0:
                raise EOFError(f"{self._path} ends at byte {offset:,}")
            offset += count
            queue = _after(queue, count)

    def close(self) -> None:
        """Closes the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _after(pieces: list[memoryview], count: int) -> list[memoryview]:
    """Returns what is left of `pieces` when `count` bytes of them are done."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []

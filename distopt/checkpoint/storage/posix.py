"""Checkpoints on a local or shared disk: fsync before rename, so that a power cut leaves all of it or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distopt.checkpoint.errors import CheckpointError, DirectoryInUseError
from distopt.checkpoint.storage.names import step_of

LOCK = ".lock"
_LEFTOVER = re.compile(r"\.tmp-\d{8,19}-[0-9a-f]{8,32}|\.del-step-\d{8,19}-[0-9a-f]{8}")
_SENT_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # of Linux
_MAX_PIECES = 512  # below every system's limit for one writev or preadv (IOV_MAX is 1024 on Linux)


class LocalStorage:
    """Implements `Storage` with the calls of POSIX; the directory is made when first written to.

    On several machines it must lie on a file system that all of them share.
    """

    published_is_committed = True

    def __init__(self, root: Path) -> None:
        self.path = root.absolute()  # the same wherever the script goes meanwhile
        self.root = str(self.path)
        self._lock: int | None = None

    def lock(self) -> str:
        """Takes `.lock`, which the kernel frees when the process ends, however it ends.

        Raises:
            DirectoryInUseError: when another job holds it; it names the job's host and process.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise DirectoryInUseError(
                f"{self.root}: another job writes its checkpoints here (it says: {holder}). "
                "Stop it, or give this run another run_dir."
            ) from None
        except OSError:
            os.close(fd)
            raise
        self._lock = fd
        token = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": os.urandom(8).hex()})
        os.ftruncate(fd, 0)
        os.pwrite(fd, token.encode(), 0)
        return token

    def lock_token(self) -> str:
        """Reads `.lock`; empty when it is not there."""
        try:
            return (self.path / LOCK).read_text()
        except FileNotFoundError:
            return ""

    def unlock(self) -> None:
        """Frees `.lock`; the file stays, since deleting it would race with another job's opening it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_writable(self) -> None:
        """Makes a file without a name: ranks of several hosts may share process ids, and rank 0 clears leftovers."""
        self.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".probe-", dir=self.path):
            pass

    def begin(self, step: int, attempt: str) -> str:
        """Makes the work folder, which may be lost with the power until it is published."""
        folder = self.work_folder(step, attempt)
        os.mkdir(self.path / folder, 0o700)
        return folder

    def work_folder(self, step: int, attempt: str) -> str:
        """A name that `folders` does not list."""
        return f".tmp-{step:08d}-{attempt}"

    def final_folder(self, step: int, attempt: str) -> str:
        """One folder per step: a published one holds that name."""
        return f"step-{step:08d}"

    def has_folder(self, folder: str) -> bool:
        """Looks anew each time."""
        return (self.path / folder).is_dir()

    def create(self, folder: str, name: str) -> LocalSink:
        """Opens with O_EXCL: never over another file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return LocalSink(os.open(self.path / folder / name, flags, 0o600))

    def open(self, folder: str, name: str) -> LocalSource:
        """Opens without following links, and without waiting for the writer of a pipe."""
        within = os.open(self.path / folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=within)
        finally:
            os.close(within)
        return LocalSource(fd, f"{self.root}/{folder}/{name}")

    def files(self, folder: str) -> list[str]:
        """Lists the folder."""
        return sorted(os.listdir(self.path / folder))

    def sync_folder(self, folder: str) -> None:
        """Syncs the folder's own data: the names in it."""
        self._sync(self.path / folder)

    def publish(self, folder: str, step: int) -> str:
        """Renames, then syncs the parent: only then is the new name sure to be there after a power cut."""
        final = self.final_folder(step, "")
        if (self.path / final).exists():  # rename would take an empty folder's place; the lock keeps others out
            raise FileExistsError(errno.EEXIST, "a checkpoint of that step is there", str(self.path / final))
        os.rename(self.path / folder, self.path / final)
        self._sync(self.path)
        return final

    def set_aside(self, folder: str) -> str:
        """Renames to a name that `folders` does not list, and syncs that."""
        doomed = f".del-{folder}-{os.urandom(4).hex()}"
        os.rename(self.path / folder, self.path / doomed)
        self._sync(self.path)
        return doomed

    def remove(self, folder: str) -> None:
        """Deletes recursively; never called on a name that `folders` lists."""
        if step_of(folder) is not None:
            raise CheckpointError(f"{self.root}/{folder}: set it aside before removing it.")
        shutil.rmtree(self.path / folder)

    def remove_file(self, folder: str, name: str) -> None:
        """Unlinks; a file that is gone already is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path / folder / name)

    def folders(self) -> list[str]:
        """Everything with the name of a step, link or not: what is wrong with it is found when it is opened."""
        return [name for name in self._names() if step_of(name) is not None]

    def leftovers(self) -> list[str]:
        """Work folders and folders set aside."""
        return [name for name in self._names() if _LEFTOVER.fullmatch(name)]

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def _sync(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class LocalSink:
    """A new file on disk. After any error it is abandoned: a second fsync could report success for lost pages."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._written = self._sent = 0

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Writes all bytes, however few the system takes at a time, and has the disk begin with them."""
        queue = [piece for piece in pieces if len(piece)]
        while queue:
            written = os.writev(self._fd, queue[:_MAX_PIECES])
            queue = _after(queue, written)
            self._written += written
        if self._written - self._sent >= _SENT_BYTES and _sync_file_range is not None:
            # Else it would stand idle until fsync, which alone tells whether the disk has taken them.
            start, length = ctypes.c_int64(self._sent), ctypes.c_int64(self._written - self._sent)
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
        """Closes without a word."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1


class LocalSource:
    """A regular file on disk."""

    def __init__(self, fd: int, where: str) -> None:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", where)
        self._fd = fd
        self._where = where
        self.size = status.st_size

    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Reads at an offset, so that several threads can share the file."""
        queue = [piece for piece in pieces if len(piece)]
        while queue:
            count = os.preadv(self._fd, queue[:_MAX_PIECES], offset)
            if count == 0:
                raise EOFError(f"{self._where} ends at byte {offset:,}")
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

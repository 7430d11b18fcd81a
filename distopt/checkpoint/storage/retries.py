"""Calls of a storage that fail for a moment are made again, with growing pauses.

An error of a disk or network (EIO, ESTALE, EMFILE, 503 of an object store) says nothing about what is stored. Most of
them have passed a second later, so calls are repeated here, for every kind of storage. What lasts is raised with the
number of tries; whoever reads then ends, and takes nothing for damaged or deletable.

This module imports no torch, see `commit`.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TypeVar

from distopt.checkpoint.storage.base import ReadStream, Storage, SyncError, WriteStream

PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Before each further try: six seconds in all, which outlast a failover, and no user's patience."""

_NUM_SILENT = 2  # tries again that nobody needs to hear of

# What the same call would only meet again: answers about names, rights and space, and calls that make no sense. All
# else may pass, and so may errors without a number, which is what most libraries of object stores raise.
_LASTING = frozenset(
    {
        errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG,
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EXDEV, errno.EINVAL,
        errno.EBADF, errno.ENXIO, errno.ENODEV, errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP,
    }
)  # fmt: skip
_LASTING_KINDS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError, SyncError)

logger = logging.getLogger(__name__)
T = TypeVar("T")


def may_pass(error: OSError) -> bool:
    """Returns whether the same call may succeed a little later.

    Example:
        >>> may_pass(OSError(errno.EIO, "input/output error")), may_pass(OSError(errno.ENOSPC, "no space left"))
        (True, False)
    """
    return not isinstance(error, _LASTING_KINDS) and error.errno not in _LASTING


def retried(call: Callable[[], T], prepare: Callable[[], object] = lambda: None) -> T:
    """Returns what `call` returns, made again after each error that may pass.

    Args:
        call: May be made more than once.
        prepare: Called before each further try, to undo what the failed one has left.

    Raises:
        OSError: One that does not pass, or the last one when all tries have failed; it then says how many.
    """
    for number, pause_s in enumerate(PAUSES_S, 1):
        try:
            return call()
        except OSError as error:
            if not may_pass(error):
                raise
            level = logging.INFO if number <= _NUM_SILENT else logging.WARNING
            logger.log(level, "trying again in %g s (%d of %d): %s", pause_s, number, len(PAUSES_S), error)
        time.sleep(pause_s)
        prepare()

    try:
        return call()
    except OSError as error:
        if not may_pass(error):
            raise
        text = f"{error.strerror or error} (tried {len(PAUSES_S) + 1} times in {sum(PAUSES_S):g} s)"
        raise (OSError(error.errno, text, error.filename) if error.errno else OSError(text)) from error


class RetryingStorage(Storage):
    """A storage whose calls are made again while they fail for a moment.

    All but `create`: half a file cannot be written again from its middle, so those who write files repeat the whole of
    it (see `commit`).

    Args:
        storage: Any storage; none of its calls does harm when it is made twice.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.root = storage.root
        self.commits_by_rename = storage.commits_by_rename

    def create(self, folder: str, name: str) -> WriteStream:
        """Opens a new file for writing, once."""
        return self._storage.create(folder, name)

    def open(self, folder: str, name: str) -> ReadStream:
        """Opens a file whose reads are made again, too."""
        return _RetryingReadStream(lambda: self._storage.open(folder, name))

    def remove_file(self, folder: str, name: str) -> None:
        """Deletes one file."""
        retried(lambda: self._storage.remove_file(folder, name))

    def files(self, folder: str) -> list[str]:
        """Lists a folder."""
        return retried(lambda: self._storage.files(folder))

    def folders(self) -> list[str]:
        """Lists the root."""
        return retried(self._storage.folders)

    def remove(self, folder: str) -> None:
        """Deletes a folder; one that is gone when a try has failed was deleted by it."""
        self._unless_done(lambda: self._storage.remove(folder), FileNotFoundError)

    def make_folder(self, folder: str) -> None:
        """Makes a folder; one that is there when a try has failed was made by it, since names are unique."""
        self._unless_done(lambda: self._storage.make_folder(folder), FileExistsError)

    def sync_folder(self, folder: str) -> None:
        """Syncs the names in a folder."""
        retried(lambda: self._storage.sync_folder(folder))

    def publish(self, folder: str, final: str) -> None:
        """Commits a folder."""
        retried(lambda: self._storage.publish(folder, final))

    def set_aside(self, folder: str) -> str:
        """Makes a checkpoint one no longer."""
        return retried(lambda: self._storage.set_aside(folder))

    def check_writable(self) -> None:
        """Raises if this rank cannot write."""
        retried(self._storage.check_writable)

    def lock(self) -> AbstractContextManager[str]:
        """Returns the storage's own lock; `consensus.claim` tries again to enter it."""
        return self._storage.lock()

    def _unless_done(self, call: Callable[[], None], done: type[OSError]) -> None:
        tries = 0

        def once() -> None:
            nonlocal tries
            tries += 1
            try:
                call()
            except done:
                if tries == 1:
                    raise

        retried(once)


class _RetryingReadStream(ReadStream):
    """A file that is opened anew when a read of it fails: a stale handle does not recover.

    Args:
        reopen: Opens the file.
    """

    def __init__(self, reopen: Callable[[], ReadStream]) -> None:
        self._reopen = reopen
        self._stream = retried(reopen)
        self._replaced: list[ReadStream] = []  # other threads may still be reading from them
        self._lock = threading.Lock()
        self.size = self._stream.size

    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        stream = self._stream

        def read() -> None:
            stream.read_into(offset, pieces)

        def replace() -> None:
            nonlocal stream
            with self._lock:
                if self._stream is stream:
                    fresh = self._reopen_same()
                    self._replaced.append(stream)
                    self._stream = fresh
                stream = self._stream

        retried(read, replace)

    def close(self) -> None:
        for stream in (*self._replaced, self._stream):
            with suppress(OSError):  # what was read is not lost by it
                stream.close()

    def _reopen_same(self) -> ReadStream:
        fresh = retried(self._reopen)
        if fresh.size != self.size:
            fresh.close()
            raise EOFError(f"it had {self.size:,} bytes when it was opened, and has {fresh.size:,} now")
        return fresh

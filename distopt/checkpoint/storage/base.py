"""Where checkpoints are stored: one contract, for a local or shared disk, an object store, or a storage of your own.

The contract has two kinds of implementations. Where a folder can be renamed in one step (`commits_by_rename`), a
checkpoint is written under another name and renamed when it is complete. Where it cannot, the folder has its final name
from the start, and counts as a checkpoint once its manifest is there; the manifest is the last file to be written.

Whoever keeps checkpoints elsewhere derives a class from `Storage`, overrides its abstract methods, and registers it
under the scheme of its URLs:

    class DatabaseStorage(Storage): ...

    register_storage("database", DatabaseStorage)
    Checkpointer("database://host/run", {"optimizer": optimizer})
"""

from __future__ import annotations

import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.storage.names import LOCK
from distopt.config.paths import URL, url_meant_by
from distopt.run_files import MANIFEST


class SyncError(OSError):
    """A sync has failed: what was written may be lost, and a second sync could report success for it."""


class WriteStream(ABC):
    """A file that is being written."""

    @abstractmethod
    def write(self, pieces: Sequence[memoryview]) -> None:
        """Appends the bytes of all pieces.

        Args:
            pieces: Of bytes; not to be kept, since their memory is used again.
        """

    @abstractmethod
    def close(self) -> None:
        """Returns when the bytes would survive a power failure."""

    @abstractmethod
    def abandon(self) -> None:
        """Gives up the file after an error; it may be there, in part or not at all. Does not raise."""


class ReadStream(ABC):
    """A file that is being read; several threads read from it at once."""

    size: int
    """Bytes of the file."""

    @abstractmethod
    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Fills all pieces, in order, with the bytes from `offset` on.

        Raises:
            EOFError: The file ends before that.
            OSError: From the disk or network.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases the file."""


class Storage(ABC):
    """Folders of immutable files under one root.

    A folder with the name of a step is a checkpoint if its manifest can be read. All ranks of a job use the same root,
    at the same time; jobs exclude each other by `lock`. Errors of the disk or network are `OSError`; every call but
    `create` is made again when one may pass, so it must do no harm to make a call twice.

    Six methods are abstract. The others have defaults for a store whose files appear whole or not at all when they are
    closed, which has no folders to make, to sync or to rename, and no lock.
    """

    root: str
    """The directory or URL, for messages and to open the same storage on another rank."""

    commits_by_rename: bool = False
    """Whether `publish` renames the folder, so that one with the name of a step without a manifest is damaged; if not,
    it is an attempt that never finished."""

    # Files.

    @abstractmethod
    def create(self, folder: str, name: str) -> WriteStream:
        """Opens a new file for writing; `FileExistsError` when it exists, where the storage can know.

        Args:
            folder: Its folder, empty for the root.
            name: Its name.
        """

    @abstractmethod
    def open(self, folder: str, name: str) -> ReadStream:
        """Opens a regular file for reading, following no link; `FileNotFoundError` when there is none."""

    @abstractmethod
    def remove_file(self, folder: str, name: str) -> None:
        """Deletes one file of a folder that is no checkpoint; does nothing when there is none."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Returns the names of all files in the folder, including notes and leftovers.

        `FileNotFoundError` when there is no such folder, unless writing a file is what makes its folder.
        """

    # Folders.

    @abstractmethod
    def folders(self) -> list[str]:
        """Returns the names of everything in the root, in no order; empty when the root does not exist yet."""

    @abstractmethod
    def remove(self, folder: str) -> None:
        """Deletes a folder that is no checkpoint (any more), and all in it.

        Raises:
            CheckpointError: It still is one: `set_aside` comes first.
        """

    def make_folder(self, folder: str) -> None:  # noqa: B027, optional
        """Makes a folder for other ranks to write into, too."""

    def sync_folder(self, folder: str) -> None:  # noqa: B027, optional
        """Returns when the names in the folder (in the root, if it is empty) would survive a power failure."""

    def publish(self, folder: str, final: str) -> None:  # noqa: B027, optional
        """Gives a complete folder its final name, durably: this is the commit.

        Does nothing where the name is final already, since there the manifest was the commit.
        """

    def set_aside(self, folder: str) -> str:
        """Makes a checkpoint one no longer, durably and in one step; returns the name that `remove` takes.

        After this a deletion may stop at any point without leaving what looks like a damaged checkpoint.
        """
        self.remove_file(folder, MANIFEST)
        return folder

    # Who may write.

    def check_writable(self) -> None:  # noqa: B027, optional
        """Raises `OSError` if this rank cannot write in the root; makes the root if it does not exist."""

    def lock(self) -> AbstractContextManager[str]:
        """Returns a context in which this process is the only job that writes here.

        Entering it leaves a new token in the file `LOCK` of the root, by which the other ranks of the job recognize
        that they see the same files, and returns the token. The default excludes no other job.

        Raises:
            DirectoryInUseError: On entering, when another job holds the lock.
        """
        return self._without_exclusion()

    # Apart from `lock`, so that an override returns whatever context it likes and need not be a generator.
    @contextmanager
    def _without_exclusion(self) -> Iterator[str]:
        token = new_token()
        self.remove_file("", LOCK)
        stream = self.create("", LOCK)
        stream.write([memoryview(token.encode())])
        stream.close()
        yield token


def new_token() -> str:
    """Returns a text that tells this job from all others, and people whose it is."""
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": os.urandom(8).hex()})


_REGISTERED: dict[str, Callable[[str], Storage]] = {}


def register_storage(scheme: str, storage: Callable[[str], Storage]) -> None:
    """Makes URLs of a scheme mean a storage of your own, for this process; call it on every rank.

    Args:
        scheme: What stands before `://`; it takes precedence over a file system of fsspec.
        storage: A class derived from `Storage`, or a function that returns one; called with the whole URL.

    Raises:
        ValueError: The scheme is none, or another storage is registered for it.
    """
    if not URL.fullmatch(f"{scheme}://"):
        raise ValueError(f"{scheme!r} is no scheme of a URL; give two or more letters, digits or +, such as 'database'")
    if _REGISTERED.setdefault(scheme.lower(), storage) is not storage:
        raise ValueError(f"{scheme}:// is already registered for {_REGISTERED[scheme.lower()]!r}")


def open_storage(path: str | Path) -> Storage:
    """Returns the storage at a directory, at a URL of a registered scheme, or at a URL that fsspec knows.

    Calls that fail for a moment are made again, see `retries`.

    Raises:
        CheckpointError: The URL is of no known scheme, lacks a slash, or needs a package that is not installed.
    """
    from distopt.checkpoint.storage.retries import RetryingStorage

    return RetryingStorage(_open_once(path))


def _open_once(path: str | Path) -> Storage:
    """Returns the storage itself, whose calls raise whatever happens."""
    match = URL.match(path) if isinstance(path, str) else None
    if match is None:
        # A `Path` of a URL has lost a slash. A folder of that name would be made without a word, and the run would
        # write its checkpoints on this machine.
        url = url_meant_by(path)
        if url is not None and not os.path.exists(path):
            raise CheckpointError(f"{path}: no such folder. For a URL give the string {url!r}, and no Path.")
        from distopt.checkpoint.storage.posix import PosixStorage

        return PosixStorage(Path(path))

    # Registered schemes come first: fsspec knows dozens of names, and one of them may be what a user calls a storage.
    registered = _REGISTERED.get(match[1].lower())
    if registered is not None:
        return registered(str(path))
    try:
        from distopt.checkpoint.storage.remote import RemoteStorage

        return RemoteStorage(str(path))
    except ImportError as error:
        raise CheckpointError(f"{path}: {error}. `pip install 'distopt[remote]'` installs fsspec.") from error
    except ValueError as error:  # fsspec knows no such protocol
        raise CheckpointError(
            f"{path}: {error}. Give a folder, a URL of a file system of fsspec, or one of a registered storage."
        ) from error

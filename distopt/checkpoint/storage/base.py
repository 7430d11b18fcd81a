"""Where checkpoints are kept: one small contract, for a local or shared disk and for an object store."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from distopt.checkpoint.errors import CheckpointError

_URL = re.compile(r"[a-z0-9+]{2,}://", re.IGNORECASE)


class Sink(Protocol):
    """A file being written."""

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Appends the bytes of all pieces."""

    def close(self) -> None:
        """Returns when the bytes would survive a power cut."""

    def abandon(self) -> None:
        """Gives up: nothing is known about the file afterwards."""


class Source(Protocol):
    """A file being read."""

    size: int

    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Fills all pieces, in order, with the bytes from `offset` on; `EOFError` when they end too early."""

    def close(self) -> None:
        """Lets the file go."""


class Storage(Protocol):
    """Folders of immutable files under one root. A folder is a checkpoint when its manifest can be seen in it."""

    root: str
    published_is_committed: bool
    """A published folder has its manifest: without one it is broken, and not just an attempt that never finished."""

    def lock(self) -> str:
        """Makes this process the only writer, until `unlock` or its end; returns what `lock_token` then reads."""

    def lock_token(self) -> str:
        """Returns the token of the job that holds the lock, as seen from here; empty where there are no locks."""

    def unlock(self) -> None:
        """Lets another job write here."""

    def check_writable(self) -> None:
        """Raises `OSError` when nothing can be written here."""

    def begin(self, step: int, attempt: str) -> str:
        """Returns the work folder of this attempt, made by the first rank."""

    def work_folder(self, step: int, attempt: str) -> str:
        """Returns the name that `begin` gives."""

    def has_folder(self, folder: str) -> bool:
        """Is the folder there for other ranks to write into?"""

    def create(self, folder: str, name: str) -> Sink:
        """Opens a new file; it must not exist."""

    def open(self, folder: str, name: str) -> Source:
        """Opens a regular file, following no link; `FileNotFoundError` when there is none."""

    def files(self, folder: str) -> list[str]:
        """Returns the names of what is in the folder, notes and leftovers included."""

    def sync_folder(self, folder: str) -> None:
        """Returns when the names in it (in the root, if it is empty) would survive a power cut."""

    def publish(self, folder: str, step: int) -> str:
        """Gives the finished folder its name: the commit. Returns that name."""

    def final_folder(self, step: int, attempt: str) -> str:
        """Returns the name that `publish` gives."""

    def set_aside(self, folder: str) -> str:
        """Makes a published folder count no more, durably; returns what `remove` takes."""

    def remove(self, folder: str) -> None:
        """Deletes a folder that counts no more and all in it."""

    def remove_file(self, folder: str, name: str) -> None:
        """Deletes one file of a work folder."""

    def folders(self) -> list[str]:
        """Returns the folders that may be checkpoints, in no order."""

    def leftovers(self) -> list[str]:
        """Returns the folders of dead attempts and half-done deletions, and nothing else that lies there."""


def is_url(place: str | Path) -> bool:
    """Says whether `place` names a file system of fsspec, such as `s3://bucket/run`."""
    return isinstance(place, str) and _URL.match(place) is not None


def open_storage(place: str | Path) -> Storage:
    """Returns the storage at a directory, or at a URL that fsspec knows.

    Raises:
        CheckpointError: when the URL needs a package that is not installed.
    """
    if not is_url(place):
        from distopt.checkpoint.storage.posix import LocalStorage

        return LocalStorage(Path(place))
    try:
        from distopt.checkpoint.storage.remote import RemoteStorage

        return RemoteStorage(str(place))
    except ImportError as error:
        raise CheckpointError(f"{place}: {error}. `pip install 'distopt[remote]'` brings fsspec.") from error
    except ValueError as error:  # an unknown protocol
        raise CheckpointError(f"{place}: {error}. Give a folder, or a URL of a file system of fsspec.") from error

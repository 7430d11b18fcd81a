"""Checkpoints in an object store, or wherever else fsspec reaches.

Object stores have no rename and no lock. So each attempt is written into a folder that no other attempt uses,
`step-00000123-<attempt>`, and its manifest, the last object to be written, is the commit. Objects appear whole, or not
at all.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import fsspec

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.storage.base import ReadStream, Storage, WriteStream
from distopt.run_files import MANIFEST


@contextmanager
def _network() -> Iterator[None]:
    """Raises the errors of libraries below fsspec, each of which has classes of its own, as OSError."""
    try:
        yield
    except (OSError, EOFError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class RemoteStorage(Storage):
    """A prefix of a file system of fsspec.

    Only one job may write to a URL: nothing there keeps a second one out.

    Args:
        url: Of the folder, such as `s3://bucket/run`.

    Raises:
        ImportError: The file system needs a package that is not installed.
        ValueError: fsspec knows no such protocol.
    """

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._fs, path = fsspec.core.url_to_fs(self.root)
        self._path = str(path).rstrip("/")

    def create(self, folder: str, name: str) -> RemoteWriteStream:
        """Opens an object for writing; attempts never share a folder, so there is none of that name."""
        # Object stores have no folders and ignore this; fsspec's local and memory file systems need it.
        path = self._join(folder)
        with _network():
            self._fs.makedirs(path, exist_ok=True)
            return RemoteWriteStream(self._fs.open(f"{path}/{name}", "wb"))

    def open(self, folder: str, name: str) -> RemoteReadStream:
        """Opens an object; fsspec's listings of before are forgotten, since other ranks write too."""
        with _network():
            self._fs.invalidate_cache()
            return RemoteReadStream(self._fs.open(f"{self._join(folder)}/{name}", "rb"))

    def remove_file(self, folder: str, name: str) -> None:
        """Deletes one object."""
        with suppress(FileNotFoundError), _network():
            self._fs.rm(f"{self._join(folder)}/{name}")

    def files(self, folder: str) -> list[str]:
        """Lists the objects of a folder; writing an object makes its folder, so one without objects is empty."""
        try:
            with _network():
                self._fs.invalidate_cache()
                paths = self._fs.ls(self._join(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in paths)

    def folders(self) -> list[str]:
        """Lists the root, attempts that were never committed included."""
        return self.files("")

    def remove(self, folder: str) -> None:
        """Deletes all objects of a folder that has no manifest."""
        if MANIFEST in self.files(folder):
            raise CheckpointError(f"{self.root}/{folder}: set it aside before removing it.")
        with _network():
            self._fs.rm(self._join(folder), recursive=True)

    def check_writable(self) -> None:
        """Makes the root where folders exist; that rank 0 can write is known by its token."""
        with _network():
            self._fs.makedirs(self._path, exist_ok=True)

    def _join(self, folder: str) -> str:
        return f"{self._path}/{folder}".rstrip("/")


class RemoteWriteStream(WriteStream):
    """An object that is being written.

    Args:
        file: What fsspec's `open` returned.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Hands the bytes to fsspec, which uploads them in blocks of a size that it chooses."""
        with _network():
            for piece in pieces:
                self._file.write(piece)

    def close(self) -> None:
        """Completes the upload: the object appears."""
        with _network():
            self._file.close()

    def abandon(self) -> None:
        """Drops what was uploaded, where the file system can."""
        # Closing would complete the upload of half a file, and so would Python when it collects an open one. Not all of
        # fsspec's files can discard what they have, or be marked as closed; their attempt has no manifest then, so it
        # is removed as a leftover.
        with suppress(Exception):
            self._file.discard()
        with suppress(Exception):
            self._file.closed = True


class RemoteReadStream(ReadStream):
    """An object that is being read; several threads share its position, so they take turns.

    Args:
        file: What fsspec's `open` returned.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.size = int(file.seek(0, 2))

    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Reads one range."""
        with self._lock, _network():
            self._file.seek(offset)
            for piece in pieces:
                count = 0
                while count < len(piece):
                    received = self._file.readinto(piece[count:])
                    if not received and self._file.tell() < self.size:
                        raise OSError(
                            errno.EIO, f"the storage gave nothing at byte {offset + count:,} of {self.size:,}"
                        )
                    if not received:
                        raise EOFError(f"the object ends at byte {offset + count:,}")
                    count += received

    def close(self) -> None:
        """Releases the object; what was read is not lost by an error here."""
        with suppress(Exception):
            self._file.close()

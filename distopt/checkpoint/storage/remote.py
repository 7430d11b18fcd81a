"""Checkpoints in an object store, or wherever else fsspec reaches.

There is no rename there, and no lock: each attempt writes into a folder of its own, `step-00000123-<attempt>`, and its
manifest, the last object written, is the commit. Objects appear whole, or not at all.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any

import fsspec

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.manifest import MANIFEST
from distopt.checkpoint.storage.names import step_of

TOKEN = ".job"


class RemoteStorage:
    """Implements `Storage` over an fsspec file system.

    Only one job may write to a URL: nothing there keeps a second one out.
    """

    published_is_committed = False

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._fs, path = fsspec.core.url_to_fs(self.root)
        self._path = str(path).rstrip("/")

    def lock(self) -> str:
        """Leaves a token for the other ranks; object stores have no locks."""
        token = uuid.uuid4().hex
        self._fs.makedirs(self._path, exist_ok=True)
        self._fs.pipe_file(f"{self._path}/{TOKEN}", token.encode())
        return token

    def unlock(self) -> None:
        """Nothing to free."""

    def lock_token(self) -> str:
        """Reads the token; empty when it is not there, as where each process has a memory of its own."""
        self._fs.invalidate_cache()
        try:
            return bytes(self._fs.cat_file(f"{self._path}/{TOKEN}")).decode()
        except FileNotFoundError:
            return ""

    def check_writable(self) -> None:
        """Makes the folder where folders exist; that rank 0 can write is known by its token."""
        self._fs.makedirs(self._path, exist_ok=True)

    def begin(self, step: int, attempt: str) -> str:
        """Makes the folder where folders exist; object stores have none."""
        folder = self.work_folder(step, attempt)
        self._fs.makedirs(f"{self._path}/{folder}", exist_ok=True)
        return folder

    def work_folder(self, step: int, attempt: str) -> str:
        """Its final place already: it counts when the manifest appears."""
        return f"step-{step:08d}-{attempt}"

    def final_folder(self, step: int, attempt: str) -> str:
        """The same as the work folder."""
        return self.work_folder(step, attempt)

    def has_folder(self, folder: str) -> bool:
        """Always: writing an object makes its folder."""
        return True

    def create(self, folder: str, name: str) -> RemoteSink:
        """Opens an object for writing; attempts never share a folder, so there is none of that name."""
        path = f"{self._path}/{folder}"
        self._fs.makedirs(path, exist_ok=True)
        return RemoteSink(self._fs.open(f"{path}/{name}", "wb"))

    def open(self, folder: str, name: str) -> RemoteSource:
        """Opens an object."""
        self._fs.invalidate_cache()
        return RemoteSource(self._fs.open(f"{self._path}/{folder}/{name}", "rb"))

    def files(self, folder: str) -> list[str]:
        """Lists the objects of a folder."""
        return self._names(folder)

    def sync_folder(self, folder: str) -> None:
        """An object that was closed is safe."""

    def publish(self, folder: str, step: int) -> str:
        """Nothing to do: the manifest has been written."""
        return folder

    def set_aside(self, folder: str) -> str:
        """Deletes the manifest: without it the folder is no checkpoint."""
        self._fs.rm(f"{self._path}/{folder}/{MANIFEST}")
        return folder

    def remove(self, folder: str) -> None:
        """Deletes all objects of a folder that has no manifest."""
        if MANIFEST in self.files(folder):
            raise CheckpointError(f"{self.root}/{folder}: set it aside before removing it.")
        self._fs.rm(f"{self._path}/{folder}", recursive=True)

    def remove_file(self, folder: str, name: str) -> None:
        """Deletes one object; one that is gone already is fine."""
        try:
            self._fs.rm(f"{self._path}/{folder}/{name}")
        except FileNotFoundError:
            pass

    def folders(self) -> list[str]:
        """Every folder with the name of a step, committed or not."""
        return [name for name in self._names("") if step_of(name) is not None]

    def leftovers(self) -> list[str]:
        """Folders without a manifest: attempts that died, and deletions that were cut short."""
        return [folder for folder in self.folders() if MANIFEST not in self.files(folder)]

    def _names(self, folder: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(f"{self._path}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)


class RemoteSink:
    """An object being written."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Hands the bytes to fsspec, which uploads them in blocks of its own size."""
        for piece in pieces:
            self._file.write(piece)

    def close(self) -> None:
        """Completes the upload: the object appears."""
        self._file.close()

    def abandon(self) -> None:
        """Drops what was uploaded, where the file system can."""
        discard = getattr(self._file, "discard", None)
        if discard is not None and not self._file.closed:
            discard()
            self._file.closed = True


class RemoteSource:
    """An object being read; several threads share it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._lock = threading.Lock()
        self.size = int(file.seek(0, 2))

    def read_into(self, offset: int, pieces: Sequence[memoryview]) -> None:
        """Reads one range."""
        with self._lock:
            self._file.seek(offset)
            for piece in pieces:
                read = 0
                while read < len(piece):
                    count = self._file.readinto(piece[read:])
                    if not count:
                        raise EOFError(f"the object ends at byte {offset + read:,}")
                    read += count

    def close(self) -> None:
        """Lets the object go."""
        self._file.close()

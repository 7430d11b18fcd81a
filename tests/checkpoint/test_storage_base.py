"""The contract of storages, on each of them: a disk, an object store, and one that a user brings from elsewhere."""

from __future__ import annotations

import threading
from pathlib import Path

import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.checkpoint import (
    Checkpointer,
    CheckpointError,
    ReadStream,
    Retention,
    Storage,
    WriteStream,
    register_storage,
)
from distopt.checkpoint.chunks import read_small
from distopt.checkpoint.cli import check
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.storage.base import _REGISTERED, open_storage
from distopt.checkpoint.storage.names import LOCK, final_folder, work_folder
from distopt.config.paths import is_url
from distopt.run_files import MANIFEST

ATTEMPT = "0123456789ab"


class ShelfStorage(Storage):
    """Files in a dict of this process: the six abstract methods and nothing else."""

    shelves: dict[str, dict[tuple[str, str], bytes]] = {}

    def __init__(self, url: str) -> None:
        self.root = url
        self._files = self.shelves.setdefault(url, {})

    def create(self, folder, name):
        if (folder, name) in self._files:
            raise FileExistsError(f"{folder}/{name}")
        return ShelfWriteStream(self._files, (folder, name))

    def open(self, folder, name):
        if (folder, name) not in self._files:
            raise FileNotFoundError(f"{folder}/{name}")
        return ShelfReadStream(self._files[folder, name])

    def remove_file(self, folder, name):
        self._files.pop((folder, name), None)

    def files(self, folder):
        return [name for of, name in [*self._files] if of == folder]

    def folders(self):
        return [*{of or name for of, name in [*self._files]}]

    def remove(self, folder):
        if MANIFEST in self.files(folder):
            raise CheckpointError(f"{folder}: set it aside before removing it.")
        for name in self.files(folder):
            self.remove_file(folder, name)


class ShelfWriteStream(WriteStream):
    def __init__(self, files, key):
        self._files, self._key, self._raw = files, key, bytearray()

    def write(self, pieces):
        for piece in pieces:
            self._raw += piece

    def close(self):
        self._files[self._key] = bytes(self._raw)

    def abandon(self):
        pass


class ShelfReadStream(ReadStream):
    def __init__(self, raw):
        self._raw, self.size = raw, len(raw)

    def read_into(self, offset, pieces):
        for piece in pieces:
            if offset + len(piece) > self.size:
                raise EOFError(f"the file ends at byte {self.size}")
            piece[:] = self._raw[offset : offset + len(piece)]
            offset += len(piece)

    def close(self):
        pass


@pytest.fixture
def shelves(monkeypatch):
    monkeypatch.setattr(ShelfStorage, "shelves", {})
    register_storage("shelf", ShelfStorage)
    yield
    del _REGISTERED["shelf"]


KINDS = ["posix", "file", "memory", "shelf"]


@pytest.fixture(params=KINDS)
def storage(request, tmp_path, shelves):
    return open_storage(tmp_path / "run" if request.param == "posix" else f"{request.param}://{tmp_path}/run")


def write(storage, folder, name, raw):
    stream = storage.create(folder, name)
    stream.write([memoryview(raw[:2]), memoryview(raw[2:])])
    stream.close()


def test_file_that_was_closed_is_read_as_it_was_written_by_several_threads(storage):
    storage.check_writable()
    folder = work_folder(1, ATTEMPT, rename=storage.commits_by_rename)
    storage.make_folder(folder)
    raw = bytes(range(256)) * 100
    write(storage, folder, "data", raw)
    assert storage.files(folder) == ["data"]
    stream = storage.open(folder, "data")
    assert stream.size == len(raw)

    def read(offset):
        for _ in range(20):
            block = bytearray(1000)
            stream.read_into(offset, [memoryview(block)[:300], memoryview(block)[300:]])
            equal.append(block == raw[offset : offset + 1000])

    equal: list[bool] = []
    threads = [threading.Thread(target=read, args=(offset,)) for offset in (0, 500, 20_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 60
    with pytest.raises(EOFError, match="ends at byte"):
        stream.read_into(len(raw) - 10, [memoryview(bytearray(11))])
    stream.close()


def test_file_that_is_not_there_cannot_be_opened_and_may_be_removed(storage):
    storage.check_writable()
    storage.make_folder(".tmp-00000001-0123456789ab")
    with pytest.raises(FileNotFoundError):
        storage.open(".tmp-00000001-0123456789ab", "nothing")
    storage.remove_file(".tmp-00000001-0123456789ab", "nothing")


def test_folder_is_a_checkpoint_from_its_commit_until_it_is_set_aside(storage):
    storage.check_writable()
    names = {"step": 3, "attempt": ATTEMPT, "rename": storage.commits_by_rename}
    folder, final = work_folder(**names), final_folder(**names)
    storage.make_folder(folder)
    write(storage, folder, "data", b"data")
    assert [each for each in candidates(storage) if each.error == ""] == []
    write(storage, folder, MANIFEST, b"{}")
    storage.sync_folder(folder)
    storage.publish(folder, final)
    storage.sync_folder("")
    assert final in storage.folders()
    assert sorted(storage.files(final)) == ["data", MANIFEST]
    with pytest.raises(CheckpointError, match="set it aside before removing it"):
        storage.remove(final)

    aside = storage.set_aside(final)
    assert MANIFEST not in storage.files(final) if aside == final else final not in storage.folders()
    storage.remove(aside)
    assert storage.folders() == []


def test_lock_leaves_a_new_token_for_the_other_ranks(storage):
    tokens = []
    for _ in range(2):
        with storage.lock() as token:
            assert read_small(open_storage(storage.root), "", LOCK, 1000).decode() == token
        tokens.append(token)
    assert tokens[0] != tokens[1]


def test_root_that_is_not_there_yet_has_no_folders(storage):
    assert storage.folders() == []


def test_run_keeps_its_checkpoints_on_a_storage_from_outside_the_package(shelves, monkeypatch):
    url = "shelf://anywhere/run"
    value = pyro.param("x", torch.zeros(70_000)).unconstrained()
    with Checkpointer(url, backend=Single(), keep=Retention(2)) as checkpointer:
        for step in (1, 2, 3):
            with torch.no_grad():
                value.fill_(step)
            checkpointer.save(step)
        checkpointer.wait()
        monkeypatch.setenv("DISTOPT_FAILPOINT", "after_gather:raise")
        checkpointer.save(4)
        with pytest.raises(CheckpointError, match=f"NOT saved in {url}: .*failpoint after_gather"):
            checkpointer.wait()
        monkeypatch.delenv("DISTOPT_FAILPOINT")

    pyro.clear_param_store()
    with Checkpointer(url, backend=Single()) as checkpointer:
        assert checkpointer.steps() == [2, 3]
        assert checkpointer.restore().step == 3
        checkpointer.save(5)
    assert torch.equal(pyro.param("x").detach(), torch.full((70_000,), 3.0))
    assert [whole for _, whole in check(url)] == [True, True, True]
    assert [each.step for each in candidates(open_storage(url))] == [5, 3, 2]


def test_scheme_is_registered_once_and_must_be_one(shelves):
    register_storage("shelf", ShelfStorage)  # the same again
    register_storage("SHELF", ShelfStorage)
    with pytest.raises(ValueError, match="shelf:// is already registered for .*ShelfStorage"):
        register_storage("shelf", lambda url: ShelfStorage(url))
    with pytest.raises(ValueError, match="'a b' is no scheme of a URL"):
        register_storage("a b", ShelfStorage)


def test_url_of_an_unknown_scheme_is_refused_with_what_there_is():
    with pytest.raises(CheckpointError, match="(?s)shelf://x: Protocol not known: shelf.*one of a registered storage"):
        open_storage("shelf://x")


@pytest.mark.parametrize("path", [Path("shelf://x/runs"), "shelf:/x/runs"])
def test_url_that_has_lost_a_slash_is_refused_and_makes_no_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match="shelf:/x/runs: no such folder. For a URL give the string 'shelf://x/runs'"
    ):
        open_storage(path)
    assert not list(tmp_path.iterdir())
    Path("shelf:/x/runs").mkdir(parents=True)
    assert open_storage(path).folders() == []


def test_windows_drive_is_no_url_and_a_scheme_is():
    assert not is_url("c:/runs") and not is_url("runs/a:b") and is_url("s3://bucket/run") and is_url("S3://bucket")


def test_storage_that_leaves_out_a_method_cannot_be_made():
    class Half(Storage):
        def files(self, folder):
            return []

    with pytest.raises(TypeError, match="abstract methods? .*create.*folders.*open.*remove.*remove_file"):
        Half()

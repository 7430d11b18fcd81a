"""Errors that pass cost a moment, errors that last end the run; nothing is deleted because it could not be read."""

from __future__ import annotations

import errno
import os
import random
import time

import fsspec
import pyro
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from distopt.backends import current
from distopt.checkpoint import Checkpointer, CheckpointError, Retention, Storage, UnreadableCheckpointError
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.retention import retain
from distopt.checkpoint.storage import retries
from distopt.checkpoint.storage.base import SyncError, open_storage
from distopt.checkpoint.storage.retries import RetryingStorage, may_pass, retried
from tests import workers
from tests.checkpoint.runs import checkpointer, value


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retries, "PAUSES_S", (0.0,) * len(retries.PAUSES_S))


def failing(times, error=errno.EIO):
    """Returns a function that fails so often, and the list of its calls."""
    calls = []

    def call():
        calls.append(len(calls))
        if len(calls) <= times:
            raise error if isinstance(error, OSError) else OSError(error, os.strerror(error), "file")
        return "done"

    return call, calls


PASSING = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN,
           errno.EBUSY, errno.ENOLCK, OSError("503 Slow Down"), TimeoutError("no answer")]  # fmt: skip
LASTING = [errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP,
           FileNotFoundError("no key"), PermissionError("403"), SyncError(errno.EIO, "lost")]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_call_whose_error_may_pass_is_made_again_until_it_succeeds(error):
    call, calls = failing(len(retries.PAUSES_S), error)
    prepared = []
    assert retried(call, lambda: prepared.append(1)) == "done"
    assert len(calls) == len(retries.PAUSES_S) + 1 == len(prepared) + 1


@pytest.mark.parametrize("error", LASTING, ids=str)
def test_call_whose_error_lasts_is_made_once(error):
    call, calls = failing(1, error)
    with pytest.raises(OSError):
        retried(call)
    assert calls == [0]


def test_error_that_does_not_pass_is_raised_with_its_number_file_and_tries():
    call, _ = failing(100)
    with pytest.raises(OSError, match=r"tried 8 times in .*: 'file'") as caught:
        retried(call)
    assert caught.value.errno == errno.EIO
    call, _ = failing(100, OSError("503"))
    with pytest.raises(OSError, match="503 .tried 8 times"):
        retried(call)


def test_pauses_grow_and_outlast_a_few_seconds(monkeypatch):
    monkeypatch.undo()
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    call, _ = failing(100)
    with pytest.raises(OSError):
        retried(call)
    assert slept == sorted(set(slept)) and sum(slept) > 5


class Stuttering(Storage):
    """A storage each of whose calls does its work and fails afterwards, the first time."""

    def __init__(self, storage):
        self._storage, self.root, self.commits_by_rename = storage, storage.root, storage.commits_by_rename
        self.failed = set()

    def _once(self, name, *args):
        result = getattr(self._storage, name)(*args)
        if (name, *args) not in self.failed:
            self.failed.add((name, *args))
            raise OSError(errno.EIO, "after the work was done")
        return result

    def create(self, folder, name):
        return self._storage.create(folder, name)

    def open(self, folder, name):
        return self._once("open", folder, name)

    def remove_file(self, folder, name):
        return self._once("remove_file", folder, name)

    def files(self, folder):
        return self._once("files", folder)

    def folders(self):
        return self._once("folders")

    def remove(self, folder):
        return self._once("remove", folder)

    def make_folder(self, folder):
        return self._once("make_folder", folder)

    def check_writable(self):
        return self._once("check_writable")


@pytest.mark.parametrize("kind", ["posix", "memory"])
def test_call_that_succeeded_and_yet_failed_may_be_made_again(kind, tmp_path):
    inner = open_storage(tmp_path / "run" if kind == "posix" else f"memory://{tmp_path}/stutter")._storage
    storage = RetryingStorage(Stuttering(inner))
    storage.check_writable()
    storage.make_folder(".tmp-00000001-0123456789ab")
    stream = storage.create(".tmp-00000001-0123456789ab", "a")
    stream.write([memoryview(b"abc")])
    stream.close()
    raw = bytearray(3)
    with_size = storage.open(".tmp-00000001-0123456789ab", "a")
    with_size.read_into(0, [memoryview(raw)])
    with_size.close()
    assert (raw, with_size.size) == (b"abc", 3)
    storage.remove_file(".tmp-00000001-0123456789ab", "none")
    assert storage.files(".tmp-00000001-0123456789ab") == ["a"]
    storage.remove(".tmp-00000001-0123456789ab")
    assert ".tmp-00000001-0123456789ab" not in storage.folders()


class FlakyFile(MemoryFile):
    def write(self, raw):
        FlakyFileSystem.fail()
        return super().write(raw)

    def readinto(self, raw):
        FlakyFileSystem.fail()
        return super().readinto(raw)

    def close(self):
        FlakyFileSystem.fail()


class FlakyFileSystem(MemoryFileSystem):
    """An object store a share of whose calls fails, before or after they did their work."""

    protocol = "flaky"
    share = 0.0
    chance = random.Random(1)
    num_failed = 0

    @classmethod
    def fail(cls):
        if cls.chance.random() < cls.share:
            cls.num_failed += 1
            raise cls.chance.choice([OSError("503 Slow Down"), TimeoutError("read"), _HttpError("502 Bad Gateway")])

    def _open(self, path, mode="rb", **kwargs):
        self.fail()
        if mode == "wb":
            self.store[path] = FlakyFile(self, path)
            return self.store[path]
        file = FlakyFile(self, path, self.store[self._strip_protocol(path)].getvalue()) if path in self.store else None
        if file is None:
            raise FileNotFoundError(path)
        file.seek(0)
        return file


class _HttpError(Exception):
    """Some libraries below fsspec raise errors that are no OSError."""


for _name in ("ls", "rm", "makedirs"):

    def _wrapped(self, *args, _name=_name, **kwargs):
        if type(self).chance.random() < 0.5:
            self.fail()
            return getattr(MemoryFileSystem, _name)(self, *args, **kwargs)
        result = getattr(MemoryFileSystem, _name)(self, *args, **kwargs)
        self.fail()
        return result

    setattr(FlakyFileSystem, _name, _wrapped)


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(FlakyFileSystem, "store", {})
    monkeypatch.setattr(FlakyFileSystem, "chance", random.Random(7))
    monkeypatch.setattr(FlakyFileSystem, "num_failed", 0)
    return FlakyFileSystem


@pytest.mark.parametrize(("share", "most_lost"), [(0.02, 0), pytest.param(0.1, 3, marks=pytest.mark.slow)])
def test_object_store_whose_calls_fail_now_and_then_loses_hardly_a_save(share, most_lost, flaky, monkeypatch):
    monkeypatch.setattr(flaky, "share", share)
    num_lost = 0
    newest = 0
    with checkpointer("flaky://bucket/run", keep=Retention(3)) as keeper:
        for step in range(1, 61):
            value(step, 3_000)
            try:
                keeper.save(step)
                keeper.wait()
                newest = step
            except CheckpointError:
                num_lost += 1
    with checkpointer("flaky://bucket/run") as keeper:
        value(0)
        assert keeper.restore().step == newest
    assert torch.equal(pyro.param("x").detach(), torch.full((3_000,), float(newest)))
    assert flaky.num_failed > 30 and num_lost <= most_lost


READS = ["open", "preadv", "listdir"]


@pytest.fixture
def unreadable(monkeypatch):
    """Returns a function that makes system calls on some paths fail, from then on or so many times."""
    counts = {}

    def break_reads(call, where, number, times=10**9):
        real = getattr(os, call)

        def failing(target, *args, **kwargs):
            above = kwargs.get("dir_fd")
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            path = f"{os.readlink(f'/proc/self/fd/{above}')}/{path}" if above is not None else path
            writes = call == "open" and args[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if where in path and not writes and counts.setdefault(call, 0) < times:
                counts[call] += 1
                raise OSError(number, os.strerror(number), path)
            return real(target, *args, **kwargs)

        monkeypatch.setattr(os, call, failing)

    yield break_reads
    monkeypatch.undo()


def three_checkpoints(root):
    with checkpointer(root) as keeper:
        for step in (1, 2, 3):
            value(step)
            keeper.save(step)


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES], ids=errno.errorcode.get)
def test_checkpoint_that_cannot_be_read_ends_the_run_by_name_and_stays(call, number, tmp_path, unreadable):
    three_checkpoints(tmp_path)
    value(0)
    with checkpointer(tmp_path) as keeper:
        unreadable(call, "step-00000003", number)
        with pytest.raises(UnreadableCheckpointError, match=r"step-00000003.*cannot be read, which does not mean"):
            keeper.restore()
    assert pyro.param("x").sum() == 0
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [f"step-0000000{step}" for step in (1, 2, 3)]


@pytest.mark.parametrize("call", READS)
def test_checkpoint_that_cannot_be_read_for_a_moment_is_restored(call, tmp_path, unreadable):
    three_checkpoints(tmp_path)
    with checkpointer(tmp_path) as keeper:
        unreadable(call, str(tmp_path), errno.EIO, times=5)
        assert keeper.restore().step == 3
        assert pyro.param("x")[0] == 3


def test_run_that_cannot_read_its_newest_checkpoint_begins_no_generation(tmp_path, unreadable):
    three_checkpoints(tmp_path)
    unreadable("open", "step-00000003", errno.EIO)
    with pytest.raises(UnreadableCheckpointError, match="step-00000003"):
        checkpointer(tmp_path)


def test_retention_deletes_nothing_that_it_cannot_read(tmp_path, unreadable):
    with checkpointer(tmp_path, keep=Retention(5)) as keeper:
        for step in (1, 2, 3, 4):
            value(step)
            keeper.save(step)
    unreadable("open", "step-00000001", errno.EIO)
    storage = open_storage(tmp_path)
    retain(storage, Retention(2))
    assert [each.step for each in candidates(storage)] == [1, 4, 3]


def _restore_where_rank_1_cannot_read(directory):
    backend = current()
    retries.PAUSES_S = (0.0,)
    pyro.param("x", torch.zeros(3))
    with Checkpointer(directory) as keeper:
        for step in (1, 2):
            keeper.save(step)
        keeper.wait()
        real = os.preadv

        def fail(fd, *args):
            if backend.rank == 1 and "step-00000002" in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.EIO, "input/output error")
            return real(fd, *args)

        os.preadv = fail
        try:
            keeper.restore()
        except UnreadableCheckpointError as error:
            return str(error), keeper.steps()
        finally:
            os.preadv = real


def test_checkpoint_that_one_rank_cannot_read_ends_the_run_on_all(tmp_path):
    ended = workers.world("torch_dist", 2).run(_restore_where_rank_1_cannot_read, str(tmp_path))
    assert ended[0][0] == ended[1][0] and ended[0][0].startswith("rank 1 of 2: ")
    assert ended[0][1] == [1, 2]


def test_errors_that_may_pass_are_told_from_those_that_last():
    assert may_pass(ConnectionResetError("reset")) and not may_pass(IsADirectoryError("folder"))

"""What ranks find wrong with their directory or a save is raised by all of them."""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pyro
import pytest
import torch

from distopt.backends import current
from distopt.checkpoint import Checkpointer, CheckpointError
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.retention import remove_leftovers
from distopt.checkpoint.storage.base import open_storage
from tests import workers
from tests.checkpoint.runs import checkpointer


def test_ranks_may_try_the_directory_while_rank_0_clears_it(tmp_path):
    storage, done = open_storage(tmp_path), threading.Event()

    def clear():
        while not done.is_set():
            remove_leftovers(storage)

    with ThreadPoolExecutor(3) as pool:
        clearing = pool.submit(clear)
        trying = [pool.submit(lambda: [storage.check_writable() for _ in range(500)]) for _ in range(2)]
        try:
            for one in trying:
                one.result(60)
        finally:
            done.set()
        clearing.result(60)
    assert os.listdir(tmp_path) == []


def test_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount read-only")
    mount = tmp_path / "read-only"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(mount)], check=True)
    try:
        with pytest.raises(CheckpointError, match=rf"{mount}/run cannot hold checkpoints: .*Read-only file system"):
            checkpointer(mount / "run")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _disagree(directory, what):
    backend = current()
    if what == "directory":
        directory += str(backend.rank)
    with Checkpointer(directory) as keeper:
        if what == "value" and backend.rank == 1:
            pyro.get_param_store()  # rank 1 alone has a module whose state cannot be saved
            keeper._state.per_rank["odd"] = _Odd()
        try:
            keeper.save(1 + (what == "step") * backend.rank)
        except CheckpointError as error:
            return str(error)
        keeper.wait()
    return ""


class _Odd:
    def state_dict(self):
        return object()


def test_ranks_that_disagree_all_raise_the_same(tmp_path):
    world = workers.world("torch_dist", 2)
    errors = world.run(_disagree, str(tmp_path / "a"), "value")
    assert errors[0] == errors[1] and "rank 1 of 2: rank/objects/odd: a builtins.object cannot be saved" in errors[0]
    errors = world.run(_disagree, str(tmp_path / "b"), "step")
    assert errors[0] == errors[1] and "ranks save different steps: [1, 2]" in errors[0]
    with pytest.raises(workers.RankFailed, match=r"rank\(s\) \[1\] of 2 do not see what rank 0 writes"):
        world.run(_disagree, str(tmp_path / "c"), "directory")


def _open_memory(url):
    try:
        with Checkpointer(url, timeout=timedelta(seconds=30)):
            return "opened"
    except CheckpointError as error:
        return str(error)


def _save_to_url(url):
    pyro.param("x", torch.full((3,), 2.0))
    with Checkpointer(url) as keeper:
        for step in (1, 2):
            keeper.save(step, progress=current().rank)
            keeper.wait()
        current().barrier()
        return keeper.restore().step


def test_url_on_several_ranks_must_be_one_place(tmp_path):
    world = workers.world("torch_dist", 2)
    for errors in world.run(_open_memory, "memory://run"):
        assert "rank(s) [1] of 2 do not see what rank 0 writes there" in errors
    assert world.run(_save_to_url, f"file://{tmp_path}/run") == [2, 2]
    assert [one.manifest.world_size for one in candidates(open_storage(f"file://{tmp_path}/run"))] == [2, 2]

"""How saving and resuming behave when disks, configurations, other jobs or other worlds are in the way."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pyro
import pytest
import torch

from distopt.backends import current
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError, ConfigMismatchError, DirectoryInUseError, Retention
from distopt.checkpoint.reader import candidates, verify
from distopt.checkpoint.retention import remove_leftovers
from distopt.checkpoint.storage.base import open_storage
from distopt.checkpoint.storage.posix import PosixWriteStream
from tests import workers
from tests.checkpoint.faults import ROOT


def value(number, size=4):
    pyro.clear_param_store()
    pyro.param("x", torch.full((size,), float(number)))


def checkpointer(root, state=None, **settings):
    return Checkpointer(root, state, backend=Single(), **settings)


def test_second_job_on_a_directory_is_refused_and_a_dead_ones_lock_is_free(tmp_path):
    script = (
        "import sys; from distopt.checkpoint.storage.posix import PosixStorage; from pathlib import Path\n"
        "PosixStorage(Path(sys.argv[1])).lock().__enter__(); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(
            DirectoryInUseError, match=rf'another job .*"pid": {other.pid}.*give this run another run_dir'
        ):
            checkpointer(tmp_path)
    finally:
        other.kill()
        other.communicate()
    checkpointer(tmp_path).close()


def test_two_checkpointers_of_one_process_exclude_each_other(tmp_path):
    with checkpointer(tmp_path), pytest.raises(DirectoryInUseError):
        checkpointer(tmp_path)


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


def test_full_disk_fails_loudly_frees_its_space_and_the_last_good_one_stands(tmp_path, caplog):
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)], check=True)
    try:
        with checkpointer(mount / "run") as keeper:
            value(1)
            keeper.save(1)
            keeper.wait()
            value(2, 2_000_000)
            keeper.save(2)
            with pytest.raises(
                CheckpointError,
                match=rf"step 2 was NOT saved in {mount}/run: .*No space left.* \(8,0\d\d,\d+ bytes of this rank\)",
            ):
                keeper.wait()
            keeper.wait()  # told once
            assert keeper.steps() == [1]
            assert shutil.disk_usage(mount).used < 1 << 20
            value(3)
            keeper.save(3)
            keeper.wait()
            assert keeper.steps() == [1, 3]
        assert "Training continues; the last good checkpoint remains" in caplog.text
        assert not [path for path in (mount / "run").iterdir() if path.name.startswith(".tmp")]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


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


def test_directory_without_permission_is_refused_for_an_ordinary_user(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if "pytest" in parent.name:
            parent.chmod(0o755)
    script = (
        "import os, sys; from pathlib import Path; from distopt.checkpoint.storage.posix import PosixStorage\n"
        "os.setuid(65534)\ntry: PosixStorage(Path(sys.argv[1])).lock().__enter__()\n"
        "except PermissionError as error: print(error)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(closed)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"Permission denied: '{closed}" in found.stdout, found.stderr


def test_error_in_the_thread_alone_surfaces_at_wait_and_nothing_is_committed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DISTOPT_FAILPOINT", "after_write:raise")
    with checkpointer(tmp_path) as keeper:
        value(1)
        keeper.save(1)
        with pytest.raises(CheckpointError, match="step 1 was NOT saved .* failpoint after_write"):
            keeper.wait()
        assert (keeper.steps(), keeper.committed_at) == ([], None)
        monkeypatch.delenv("DISTOPT_FAILPOINT")
        keeper.save(1)  # the same step again: the first try did not count
        keeper.wait()
        assert (keeper.steps(), keeper.committed_at is None) == ([1], False)
    assert "was NOT saved" in caplog.text


def test_step_goes_on_while_the_disk_is_slow_and_a_save_in_between_is_skipped_or_waits(tmp_path, monkeypatch, caplog):
    gate, entered = threading.Event(), threading.Event()
    close = PosixWriteStream.close

    def slow(sink):
        entered.set()
        assert gate.wait(60)
        close(sink)

    monkeypatch.setattr(PosixWriteStream, "close", slow)
    with checkpointer(tmp_path, when_busy="skip", timeout=timedelta(seconds=0.05)) as keeper:
        value(1)
        keeper.save(1)  # returns, though the disk does not answer
        assert entered.wait(60)
        keeper.save(2)
        assert "step 2: skipped: rank(s) [0] are still writing the previous checkpoint" in caplog.text
        with pytest.raises(CheckpointError, match="step 1: still not saved after 0.2 s"):
            keeper.wait()
        gate.set()
        keeper.save(3)  # by now it may be skipped or not
    with checkpointer(tmp_path) as keeper:
        value(4)
        keeper.save(4)
        keeper.save(5)
        keeper.wait()
        assert keeper.steps()[-2:] == [4, 5]


def test_checkpoint_of_another_configuration_is_refused_with_the_difference_unless_told_otherwise(tmp_path):
    config = {"seed": 1, "optim": {"name": "Adam", "args": {"lr": 0.1}}, "name": "a", "reduce": {"op": "average"}}
    value(1)
    with checkpointer(tmp_path, config=config) as keeper:
        keeper.save(1)
    changed = config | {"optim": {"name": "Adam", "args": {"lr": 0.2}}, "extra": 1}
    with checkpointer(tmp_path, config=changed) as keeper:
        with pytest.raises(ConfigMismatchError) as refused:
            keeper.restore()
        assert "optim.args.lr: 0.1 in the checkpoint, 0.2 now" in str(refused.value)
        assert "extra: absent in the checkpoint, 1 now" in str(refused.value)
        assert keeper.restore(any_config=True).step == 1
    changed = config | {"name": "b", "reduce": {"op": "sum"}, "optim": config["optim"] | {"name": "SGD"}}
    with checkpointer(tmp_path, config=changed) as keeper:
        with pytest.raises(ConfigMismatchError) as refused:
            keeper.restore()
        assert str(refused.value).splitlines()[1:-1] == [
            "  name: 'a' in the checkpoint, 'b' now",
            "  optim.name: 'Adam' in the checkpoint, 'SGD' now",
            "  reduce.op: 'average' in the checkpoint, 'sum' now",
        ]
    with checkpointer(tmp_path, config=changed, ignore_keys=("name", "optim.name", "reduce")) as keeper:
        assert keeper.restore().step == 1


def test_restore_finds_by_step_and_path_and_says_what_there_is(tmp_path):
    with checkpointer(tmp_path / "a" / "checkpoints") as keeper:
        for step in (1, 2):
            value(step)
            keeper.save(step)
        keeper.wait()
        assert keeper.restore("never") is None
        assert keeper.restore(1).step == 1 and pyro.param("x")[0] == 1
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are \[1, 2\]"):
            keeper.restore(7)
    with checkpointer(tmp_path / "b") as keeper:
        assert keeper.restore() is None
        assert keeper.restore(tmp_path / "a").step == 2
        assert keeper.restore(str(tmp_path / "a" / "checkpoints" / "step-00000001")).step == 1
        with pytest.raises(CheckpointError, match="no checkpoint there"):
            keeper.restore(tmp_path / "nowhere")
        value(9)
        keeper.save(9)
    assert [one.step for one in candidates(open_storage(tmp_path / "b"))] == [9]


def test_going_back_gives_up_the_old_future_even_before_the_next_save_deletes_it(tmp_path, monkeypatch):
    with checkpointer(tmp_path, keep=Retention(9)) as keeper:
        for step in (1, 2, 3, 4):
            value(step)
            keeper.save(step)
        keeper.wait()
        keeper.restore(2)
        with torch.no_grad():
            pyro.param("x").unconstrained().fill_(30.0)
        monkeypatch.setenv("DISTOPT_FAILPOINT", "after_acknowledge:raise")  # the deletion never comes
        keeper.save(3)
        keeper.wait()
        assert keeper.restore().step == 3
        assert pyro.param("x")[0] == 30
        monkeypatch.delenv("DISTOPT_FAILPOINT")
        keeper.save(5)
    assert [one.step for one in candidates(open_storage(tmp_path))] == [5, 3, 2, 1]


def test_retention_when_the_newest_does_not_read_back_deletes_nothing(tmp_path, monkeypatch, caplog):
    with checkpointer(tmp_path, keep=Retention(2)) as keeper:
        for step in (1, 2):
            value(step)
            keeper.save(step)
        keeper.wait()
        monkeypatch.setattr("distopt.checkpoint.retention.verify", _fail)
        keeper.save(3)
        keeper.wait()
    assert [one.step for one in candidates(open_storage(tmp_path))] == [3, 2, 1]
    assert "Older checkpoints are kept" in caplog.text


def _fail(storage, folder):
    raise CheckpointError(f"{folder} is not whole.")


@pytest.mark.parametrize("point", ["after_set_aside", "after_retention", "after_acknowledge"])
def test_crash_inside_retention_leaves_the_newest_good_ones(point, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTOPT_FAILPOINT", f"{point}:raise")
    with checkpointer(tmp_path, keep=Retention(2)) as keeper:
        for step in range(1, 6):
            value(step)
            keeper.save(step)
    storage = open_storage(tmp_path)
    good = [one.step for one in candidates(storage) if verify(storage, one.folder)]
    assert good[:2] == [5, 4]
    monkeypatch.delenv("DISTOPT_FAILPOINT")
    with checkpointer(tmp_path, keep=Retention(2)) as keeper:
        assert keeper.restore().step == 5
        keeper.save(6)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "step-00000005", "step-00000006"}


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_url_holds_checkpoints_and_the_manifest_is_the_commit(scheme, tmp_path, monkeypatch):
    url = f"{scheme}://{tmp_path}/run"
    with checkpointer(url, keep=Retention(2)) as keeper:
        for step in (1, 2, 3):
            value(step, 50_000)
            keeper.save(step)
        keeper.wait()
        monkeypatch.setenv("DISTOPT_FAILPOINT", "after_gather:raise")
        keeper.save(4)
        with pytest.raises(CheckpointError):
            keeper.wait()
        monkeypatch.delenv("DISTOPT_FAILPOINT")
        value(0)
        assert keeper.restore().step == 3
        assert torch.equal(pyro.param("x").detach(), torch.full((50_000,), 3.0))
        keeper.save(5)
        keeper.wait()
    with checkpointer(url) as keeper:
        assert keeper.restore(f"{url}/{candidates(open_storage(url))[-1].folder}").step == 3
        assert keeper.steps() == [3, 5]


def _save_rank_state(directory, steps):
    backend = current()
    norm = torch.nn.BatchNorm1d(2)
    pyro.param("x", torch.arange(3.0))
    pyro.set_rng_seed(10 + backend.rank)
    with Checkpointer(directory, {"norm": norm}, background=backend.rank % 2 == 0) as keeper:
        for step in steps:
            norm(torch.randn(4, 2))
            keeper.save(step, progress={"step": step})
        keeper.wait()
    return norm.running_mean.tolist(), torch.rand(2).tolist()


def _restore_rank_state(directory):
    norm = torch.nn.BatchNorm1d(2)
    with Checkpointer(directory, {"norm": norm}) as keeper:
        restored = keeper.restore()
    return restored.step, restored.world_size, norm.running_mean.tolist(), torch.rand(2).tolist()


def test_run_on_other_numbers_of_ranks_goes_on_with_replicated_state_and_defined_noise(tmp_path, caplog):
    saved = workers.world("torch_dist", 2).run(_save_rank_state, str(tmp_path), [1, 2])
    same = workers.world("torch_dist", 2).run(_restore_rank_state, str(tmp_path))
    assert [(mean, noise) for _, _, mean, noise in same] == [tuple(rank) for rank in saved]
    assert saved[0][0] != saved[1][0]  # batch statistics are each rank's own
    norm = torch.nn.BatchNorm1d(2)
    caplog.set_level(logging.WARNING)
    with checkpointer(tmp_path, {"norm": norm}) as keeper:
        assert keeper.restore().world_size == 2
        assert (norm.running_mean.tolist(), torch.rand(2).tolist()) == saved[0]
        assert "resumed on 1 rank(s) from a checkpoint of 2" in caplog.text
        keeper.save(3)
    wider = workers.world("torch_dist", 2).run(_restore_rank_state, str(tmp_path))
    again = workers.world("torch_dist", 2).run(_restore_rank_state, str(tmp_path))
    assert wider == again
    assert wider[0][3] != wider[1][3]


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
    said = world.run(_disagree, str(tmp_path / "a"), "value")
    assert said[0] == said[1] and "rank 1 of 2: rank/objects/odd: a builtins.object cannot be saved" in said[0]
    said = world.run(_disagree, str(tmp_path / "b"), "step")
    assert said[0] == said[1] and "ranks save different steps: [1, 2]" in said[0]
    with pytest.raises(workers.RankFailed, match=r"rank\(s\) \[1\] of 2 do not see what rank 0 writes"):
        world.run(_disagree, str(tmp_path / "c"), "directory")


def test_errno_of_every_kind_is_named_in_the_failure(tmp_path, monkeypatch):
    with checkpointer(tmp_path) as keeper:
        for code in (errno.EIO, errno.EDQUOT, errno.EROFS):

            def fail(sink, pieces, code=code):
                raise OSError(code, os.strerror(code))

            with monkeypatch.context() as patch:
                patch.setattr(PosixWriteStream, "write", fail)
                keeper.save(1)
                with pytest.raises(CheckpointError, match=os.strerror(code)):
                    keeper.wait()

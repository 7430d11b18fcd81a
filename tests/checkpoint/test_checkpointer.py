"""A run saves beside its training, and finds its state again, whatever its script does."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.checkpoint import (
    Checkpointer,
    CheckpointError,
    DirectoryInUseError,
    Retention,
)
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.storage.base import open_storage
from distopt.checkpoint.storage.posix import PosixWriteStream
from tests.checkpoint.faults import ROOT
from tests.checkpoint.runs import checkpointer, fill, value
from tests.checkpoint.states import assert_equal


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


def test_state_that_changes_after_save_returned_is_saved_as_it_was(tmp_path):
    value = pyro.param("x", torch.zeros(300_000)).unconstrained()
    with Checkpointer(tmp_path, keep=Retention(5), backend=Single()) as checkpointer:
        for step in range(1, 6):
            with torch.no_grad():
                value.fill_(step)
            checkpointer.save(step)
            with torch.no_grad():
                value.fill_(-1)
        checkpointer.wait()
        for step in checkpointer.steps():
            checkpointer.restore(step)
            assert_equal(pyro.param("x").detach(), torch.full((300_000,), float(step)))


def test_relative_directory_stays_the_same_when_the_script_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with checkpointer("run") as keeper:
        monkeypatch.chdir(tmp_path / "elsewhere")
        keeper.save(1)
        keeper.wait()
    assert (tmp_path / "run" / "step-00000001").is_dir()


@pytest.mark.parametrize("step", [-1, 10**19, 2.0, True, "3"])
def test_step_that_no_folder_could_be_found_by_is_refused_at_once(step, tmp_path):
    with checkpointer(tmp_path) as keeper, pytest.raises(CheckpointError, match="steps are whole numbers"):
        keeper.save(step)
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize("step", [np.int64(3), torch.tensor(3)], ids=repr)
def test_step_of_numpy_or_torch_is_a_step(step, tmp_path):
    with checkpointer(tmp_path) as keeper:
        keeper.save(step)
        keeper.wait()
        assert keeper.restore().step == 3


def test_progress_comes_back_as_it_was_with_what_json_lacks(tmp_path):
    progress = {"loss": math.inf, "rows": (1, np.int64(2)), 7: [None, True, "a"]}
    with checkpointer(tmp_path) as keeper:
        keeper.save(1, progress=progress)
        assert keeper.restore().progress == {"loss": math.inf, "rows": (1, 2), 7: [None, True, "a"]}
        keeper.save(2, progress={"loss": math.nan})
        assert math.isnan(keeper.restore().progress["loss"])


def test_progress_that_cannot_be_kept_is_refused_at_once_with_its_place(tmp_path):
    with checkpointer(tmp_path) as keeper:
        with pytest.raises(CheckpointError, match=r"progress/a/1: a builtins\.object cannot be saved"):
            keeper.save(1, progress={"a": [0, object()]})
        with pytest.raises(CheckpointError, match="progress/a: a tensor cannot be saved here"):
            keeper.save(1, progress={"a": torch.zeros(1)})
        keeper.save(1)


def test_progress_beyond_what_is_read_is_not_acknowledged(tmp_path):
    with checkpointer(tmp_path) as keeper:
        fill(1)
        keeper.save(1)
        keeper.save(2, progress="x" * (17 << 20))
        with pytest.raises(
            CheckpointError, match="step 2 has a manifest of 17,.* its progress or its config is too large"
        ):
            keeper.wait()
        assert keeper.restore().step == 1


def test_config_of_odd_values_equals_itself_after_a_resume(tmp_path):
    config = {
        "sizes": ((1, 2), 3),
        "clip": math.inf,
        "rows": np.int32(5),
        "lr": np.float32(0.5),
        "data": Path("a/b"),
        1: "one",
    }
    with checkpointer(tmp_path, config=config) as keeper:
        keeper.save(1)
        keeper.wait()
        assert keeper.restore().step == 1
    with pytest.raises(CheckpointError, match=r"config\.model\[1\]: a builtins\.object cannot be recorded"):
        checkpointer(tmp_path, config={"model": [1, object()]})


def test_rolling_back_while_a_save_is_under_way_waits_for_it_and_goes_on_from_the_step_asked_for(tmp_path, monkeypatch):
    entered, gate = threading.Event(), threading.Event()
    close = PosixWriteStream.close

    def slow(sink):
        entered.set()
        assert gate.wait(60)
        close(sink)

    with checkpointer(tmp_path, keep=Retention(9, every_steps=2)) as keeper:
        for step in (1, 2, 3):
            fill(step)
            keeper.save(step)
        keeper.wait()
        monkeypatch.setattr(PosixWriteStream, "close", slow)
        fill(4)
        keeper.save(4)
        assert entered.wait(60)
        threading.Timer(0.05, gate.set).start()
        assert keeper.restore(1).step == 1
        assert torch.equal(pyro.param("x").detach(), torch.full((4,), 1.0))
        assert keeper.steps() == [1, 2, 3, 4]
        fill(30)
        keeper.save(3)
        keeper.wait()
        keeper._finish()
        # 4 is of the future that was given up, though a multiple of every_steps; 2 lies before the new 3.
        assert keeper.steps() == [1, 2, 3]
        assert keeper.restore().step == 3
        assert torch.equal(pyro.param("x").detach(), torch.full((4,), 30.0))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"ignore_keys": "log"}, r"ignore_keys is 'log'; expected a list of keys, such as \['log'\]"),
        ({"when_busy": "later"}, "when_busy is 'later'; expected 'wait' or 'skip'"),
    ],
)
def test_argument_that_would_be_misread_is_refused(argument, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        Checkpointer(tmp_path, **argument)
    assert list(tmp_path.iterdir()) == []

"""What scripts do that nobody planned: each goes well, or is refused at once and in words that help."""

from __future__ import annotations

import math
import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from distopt.backends import current
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError, Retention
from distopt.checkpoint.background import BackgroundSave
from distopt.checkpoint.cli import check
from distopt.checkpoint.commit import Attempt
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.storage.base import open_storage
from distopt.checkpoint.storage.posix import PosixWriteStream
from tests import workers
from tests.checkpoint.test_exchange import run


def checkpointer(root, state=None, **settings):
    return Checkpointer(root, state, backend=Single(), **settings)


def fill(number):
    with torch.no_grad():
        pyro.param("x", torch.zeros(4)).unconstrained().fill_(number)


def test_relative_directory_stays_the_same_when_the_script_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with checkpointer("run") as keeper:
        monkeypatch.chdir(tmp_path / "elsewhere")
        keeper.save(1)
        keeper.wait()
    assert (tmp_path / "run" / "step-00000001").is_dir()


def test_directory_behind_a_link_is_the_same_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with checkpointer(tmp_path / "link") as keeper:
        keeper.save(1)
        with pytest.raises(CheckpointError, match="another job writes its checkpoints here"):
            checkpointer(tmp_path / "real")
    with checkpointer(tmp_path / "real") as keeper:
        assert keeper.restore().step == 1


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


def test_retention_that_keeps_too_little_is_refused():
    with pytest.raises(ValueError, match="every_steps is 0; give 1 or more, or None"):
        Retention(3, every_steps=0)
    with pytest.raises(ValueError, match="last is 1; keep at least 2 checkpoints"):
        Retention(1)


@pytest.mark.parametrize(
    ("state", "per_rank", "kind", "message"),
    [
        (
            {"a": {}},
            {},
            TypeError,
            r"state\['a'\] is a dict; expected a PyroOptim, an nn.Module or an object with state_dict",
        ),
        ({"a": torch.nn.Linear}, {}, TypeError, r"state\['a'\] is the class Linear"),
        ({}, {"a": 3}, TypeError, r"per_rank\['a'\] is a int; expected an object with state_dict"),
        ({"a": torch.nn.Linear(1, 1)}, {"a": torch.nn.Linear(1, 1)}, ValueError, "a: in state and in per_rank"),
    ],
    ids=["no state", "class", "no state per rank", "same name"],
)
def test_objects_that_cannot_be_saved_are_refused_at_once(state, per_rank, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        Checkpointer(tmp_path, state, per_rank=per_rank, backend=Single())
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_stay_and_leftovers_that_cannot_be_deleted_stop_no_run(tmp_path, caplog):
    (tmp_path / ".tmp-notes").write_text("mine")
    stuck = tmp_path / ".tmp-00000009-0123456789ab"
    stuck.write_text("no folder, so it is not deleted as one")
    with checkpointer(tmp_path) as keeper:
        keeper.save(1)
        keeper.wait()
        assert keeper.restore().step == 1
    assert f"{stuck} is left over and cannot be deleted" in caplog.text
    assert (tmp_path / ".tmp-notes").read_text() == "mine"


def test_times_of_files_say_nothing_about_which_is_the_newest(tmp_path):
    with checkpointer(tmp_path) as keeper:
        for step in (1, 2, 3):
            keeper.save(step)
        keeper.wait()
        for step in (1, 2, 3):
            moment = 2_000_000_000 - step * 100_000  # a clock that ran backwards
            for path in [tmp_path / f"step-{step:08d}", *(tmp_path / f"step-{step:08d}").iterdir()]:
                os.utime(path, (moment, moment))
        assert keeper.restore().step == 3


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


def test_checkpoint_that_its_run_deletes_while_it_is_verified_is_not_called_bad(tmp_path):
    with checkpointer(tmp_path) as keeper:
        keeper.save(1)
        keeper.save(2)
    lines = check(str(tmp_path))
    assert next(lines)[0].startswith("whole")
    storage = open_storage(tmp_path)
    storage.remove(storage.set_aside("step-00000001"))
    assert list(lines) == []


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
    for said in world.run(_open_memory, "memory://run"):
        assert "rank(s) [1] of 2 do not see what rank 0 writes there" in said
    assert world.run(_save_to_url, f"file://{tmp_path}/run") == [2, 2]
    assert [one.manifest.world_size for one in candidates(open_storage(f"file://{tmp_path}/run"))] == [2, 2]


def test_rank_that_writes_to_an_object_store_before_rank_0_does_keeps_its_files():
    storage = open_storage("memory://ahead")

    def save(rank):
        attempt = Attempt(1, "0123456789ab", rank, 2, timedelta(seconds=10))
        snapshots = {f"rank-{rank:05d}": take_snapshot({"x": torch.ones(3)}, HostMemory(), "own")}
        return BackgroundSave(
            storage, attempt, snapshots, lambda files: Manifest(1, attempt.id, 0, 2, files), Retention(2), lambda: None
        )

    leader, follower = save(0), save(1)
    follower.start()
    while ".prepared-00001.json" not in storage.files("step-00000001-0123456789ab"):
        time.sleep(0.01)
    leader.start()
    for one in (leader, follower):
        one.wait(timedelta(seconds=20))
        one.finish()
    assert [one.step for one in candidates(storage) if one.manifest] == [1]


def test_commands_say_in_one_line_what_is_wrong_with_what_they_are_given(tmp_path):
    good = tmp_path / "good"
    with checkpointer(good) as keeper:
        keeper.save(1)
    (tmp_path / "text.txt").write_text("hello")
    files = {
        "lacks.pt": {"params": {"x": torch.zeros(2)}, "constraints": {}},
        "list.pt": {"params": [1], "constraints": {}},
        "number.pt": 3,
        "tensor.pt": {"x": torch.zeros(1)},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    to = ("--to", tmp_path / "run")
    for arguments, words in [
        (("inspect", tmp_path / "text.txt"), "text.txt: a file; a checkpoint is a folder"),
        (("verify", good / "step-00000001" / "manifest.json"), "manifest.json: a file; a checkpoint is a folder"),
        (("verify", good / "step-00000002"), "no checkpoint there"),
        (("inspect", "foo://bar"), "foo://bar: Protocol not known: foo"),
        (("export", good, tmp_path / "no" / "x.pt"), f"there is no folder {tmp_path / 'no'}"),
        (("import", tmp_path / "lacks.pt", *to), "lacks.pt: not written by `pyro.get_param_store().save`"),
        (("import", tmp_path / "list.pt", *to), "list.pt: not written by `pyro.get_param_store().save`"),
        (("import", tmp_path / "number.pt", *to), "number.pt: not written by `pyro.get_param_store().save`"),
        (
            ("import", "--optimizer", tmp_path / "tensor.pt", *to),
            "tensor.pt: not written by the save() of a pyro.optim",
        ),
        (("import", tmp_path / "text.txt", *to), "text.txt: not a file of tensors, numbers and constraints"),
        (("import", tmp_path / "lacks.pt", "--step", "-3", *to), "step -3: steps are whole numbers"),
    ]:
        found = run(*arguments)
        assert found.exit_code == 1, arguments
        assert words in found.output and found.output.count("\n") == 1, found.output
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("step-*"))

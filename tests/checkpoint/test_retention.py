"""Which checkpoints are kept, and that nothing is deleted before its successor is known to be readable."""

from __future__ import annotations

import pytest

from distopt.backends.single import Single
from distopt.checkpoint import (
    Checkpointer,
    CheckpointError,
    Retention,
)
from distopt.checkpoint.reader import candidates, verify
from distopt.checkpoint.storage.base import open_storage
from tests.checkpoint.runs import checkpointer, value


def test_retention_that_keeps_too_little_is_refused():
    with pytest.raises(ValueError, match="every_steps is 0; give 1 or more, or None"):
        Retention(3, every_steps=0)
    with pytest.raises(ValueError, match="last is 1; keep at least 2 checkpoints"):
        Retention(1)


def test_checkpoints_when_there_are_many_the_last_and_every_mth_stay(tmp_path):
    with Checkpointer(tmp_path, keep=Retention(2, every_steps=4), backend=Single()) as checkpointer:
        for step in range(1, 12):
            checkpointer.save(step)
    assert [one.step for one in candidates(open_storage(tmp_path))] == [11, 10, 8, 4]
    assert {path.name for path in tmp_path.iterdir()} == {".lock"} | {f"step-{step:08d}" for step in (4, 8, 10, 11)}


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

"""What is recorded of a run's configuration, and which changes of it a resume accepts."""

from __future__ import annotations

import json

import pytest

from distopt.checkpoint.cli import describe
from distopt.config import load_config
from distopt.config.compare import ADDED_LATER, MAY_CHANGE
from distopt.train.recorded_config import recorded_config
from tests.train.runs import config, run_here


def test_environment_is_not_recorded_anywhere(tmp_path):
    path = config(tmp_path, launch={"workers": 1, "env": {"GREETING": "confidential"}}, train={"num_steps": 1})
    assert "env" not in recorded_config(load_config(path))["launch"]
    run_here(path)
    folders = list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert folders
    assert not any(b"confidential" in file.read_bytes() for folder in folders for file in folder.iterdir())
    recorded = next(line for line in describe(str(folders[0])) if line.strip().startswith("config:"))
    assert json.loads(recorded.partition(":")[2]) == recorded_config(load_config(path, ["reduce.backend=single"]))


@pytest.fixture
def saved(tmp_path):
    """A run of two steps that has ended."""
    path = config(tmp_path, train={"num_steps": 2}, checkpoint={"every_steps": 1})
    run_here(path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        ("reduce.op=sum", "reduce.op: 'average' in the checkpoint, 'sum' now"),
        ("reduce.compression=bf16", "reduce.compression: 'none' in the checkpoint, 'bf16' now"),
        ("reduce.power_sgd_rank=3", "reduce.power_sgd_rank: 2 in the checkpoint, 3 now"),
        ("optim.name=AdamW", "optim.name: 'Adam' in the checkpoint, 'AdamW' now"),
        ("seed=2", "seed: 1 in the checkpoint, 2 now"),
    ],
    ids=lambda change: change[0],
)
def test_change_of_what_is_computed_is_refused_on_resume(change, saved, capsys):
    override, message = change
    run_here(saved, override, status=1)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    ["reduce.bucket_mib=1", "reduce.overlap=true", "reduce.drift_every_steps=1", "reduce.timeout_s=60", "name=other"]
    + ["checkpoint.keep_last=5", "log.every_steps=1", "data.prefetch=1", "train.num_steps=3"]
    + ["optim.args.lr=0.1", "optim.clip.clip_norm=1.0", "optim.nonfinite=skip"],
)
def test_change_of_where_and_how_long_a_run_computes_is_accepted_on_resume(change, saved, capsys):
    run_here(saved, "train.num_steps=3", change)
    assert "none of" not in capsys.readouterr().err


def test_backend_may_change(saved, tmp_path):
    recorded = recorded_config(load_config(saved, ["reduce.backend=horovod"]))
    assert recorded["reduce"]["backend"] == "horovod" and "reduce.backend" in MAY_CHANGE


def test_keys_that_came_later_are_recorded_only_if_they_change_something(tmp_path):
    """The default of each is the value that runs had before it was a key, so that old runs resume unchanged."""
    loaded = load_config(config(tmp_path))
    full, recorded = loaded.model_dump(mode="json"), recorded_config(loaded)
    for dotted, value in ADDED_LATER.items():
        section, _, key = dotted.partition(".")
        assert full[section].get(key, value) == value
        assert key not in recorded[section]

"""What `load_run` gives of real runs of two workers, also while they train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import yaml

import distopt
from distopt.checkpoint import CheckpointError
from distopt.checkpoint.restore import choose
from distopt.checkpoint.storage.base import open_storage
from distopt.launch.failure_report import resume_hint
from distopt.launch.progress import progress_of
from distopt.train import SavedRun, load_run
from tests.train.runs import config, launch_well, parameters
from tests.train.tasks import NUM_ROWS


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("line")
    path = config(
        folder,
        task="tests.train.tasks:Judged",
        task_args={"guide": "AutoNormal"},
        train={"num_steps": 300},
        checkpoint={"every_steps": 100},
        optim={"name": "Adam", "args": {"lr": 0.1}},
    )
    launch_well(path, "task=tests.train.tasks:Line")
    return folder / "run"


@pytest.fixture
def line(run_dir: Path) -> SavedRun:
    pyro.clear_param_store()
    return load_run(run_dir)


def test_run_has_its_config_its_step_and_its_parameters(line: SavedRun, run_dir: Path) -> None:
    assert (line.step, line.config.name, line.config.train.num_steps) == (300, "line", 300)
    store = pyro.get_param_store()
    for name, value in parameters(run_dir).items():
        assert torch.equal(dict(store.named_parameters())[name], value)
        assert torch.equal(line.params[name], store[name])
    assert line.facts["num_workers"] == 2 and line.metrics.index[-1] == 300 and "elbo" in line.metrics
    assert load_run(run_dir, checkpoint=200).step == 200
    with pytest.raises(CheckpointError, match="no checkpoint 7; there are those of steps 100, 200, 300"):
        load_run(run_dir, checkpoint=7)


def test_run_whose_checkpoints_lie_elsewhere_is_found_by_whoever_looks_for_them(run_dir: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    (moved / "checkpoints").rename(tmp_path / "kept")
    assert progress_of(moved).checkpoint is None and resume_hint(moved) == ""
    with pytest.raises(CheckpointError, match="no run with checkpoints"):
        load_run(moved)

    keys = yaml.safe_load((moved / "config.yaml").read_text())
    keys["checkpoint"]["directory"] = str(tmp_path / "kept")
    (moved / "config.yaml").write_text(yaml.safe_dump(keys))
    assert load_run(moved).step == 300
    assert progress_of(moved).checkpoint == 300
    assert "run the same command again" in resume_hint(moved)
    storage, [newest, *_] = choose(open_storage(tmp_path), moved)
    assert (storage.root, newest.step) == (str(tmp_path / "kept"), 300)


@pytest.mark.slow
def test_quantiles_are_those_of_the_guide(line: SavedRun) -> None:
    quantiles = line.posterior([0.1, 0.5], num_samples=2000)
    assert quantiles.keys() == {"slope", "level", "scale"}
    expected = line.guide.quantiles([0.1, 0.5])
    for name, by_quantile in quantiles.items():
        spread = float(line.params[f"AutoNormal.scales.{name}"])
        assert by_quantile[0.1] == pytest.approx(float(expected[name][0]), abs=0.2 * spread)
        assert by_quantile[0.5] == pytest.approx(float(expected[name][1]), abs=0.2 * spread)
    assert torch.equal(line.samples(3)["slope"], line.samples(3)["slope"])


def test_predictions_are_of_the_rows_that_are_asked_for_and_ignore_what_was_observed(line: SavedRun) -> None:
    drawn = line.predictive(400, rows=[0, 999])["y"]
    assert drawn.shape == (400, 2)
    assert drawn.mean(0).numpy() == pytest.approx([-1.0, 3.0], abs=0.15)
    assert float(drawn.std(0).mean()) == pytest.approx(0.3, abs=0.1)
    assert line.predictive(2)["y"].shape == (2, NUM_ROWS)
    assert "y" not in line.samples(1) and line.predictive(1, rows=[1], sites=["slope"]).keys() == {"slope"}


def test_two_runs_do_not_disturb_each_other_nor_the_random_numbers_of_the_notebook(run_dir: Path) -> None:
    pyro.clear_param_store()
    early, late = (load_run(run_dir, checkpoint=step) for step in (100, 300))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    slopes = [float(run.samples(200)["slope"].mean()) for run in (early, late, early)]
    assert torch.equal(torch.rand(1), expected)
    assert slopes[0] == slopes[2] != slopes[1]
    with early.store():
        assert torch.equal(pyro.param("AutoNormal.locs.slope").detach(), early.params["AutoNormal.locs.slope"])
    assert torch.equal(pyro.param("AutoNormal.locs.slope").detach(), late.params["AutoNormal.locs.slope"])


def test_run_that_trains_is_loaded_without_its_lock(run_dir: Path, tmp_path: Path) -> None:
    with open_storage(run_dir / "checkpoints").lock():
        assert load_run(run_dir).step == 300
    pyro.clear_param_store()
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    load_run(run_dir)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    with pytest.raises(CheckpointError, match="no run with checkpoints"):
        load_run(tmp_path / "nowhere")


@pytest.mark.slow
def test_sharded_plates_are_by_global_index(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        task="tests.train.tasks:Cells",
        train={"num_steps": 400},
        data={},
        checkpoint={"every_steps": None},
        optim={"name": "Adam", "args": {"lr": 1.0}},
        log={"every_steps": 100, "tensorboard": False},
    )
    launch_well(path)
    pyro.clear_param_store()
    run = distopt.load_run(tmp_path / "run")
    assert run.params["AutoNormal.locs.z"].shape == (11,)
    assert run.params["AutoNormal.locs.z"].numpy() == pytest.approx(10.0 * np.arange(11), abs=3)
    assert run.samples(5, rows=[7, 2])["z"].mean(0).numpy() == pytest.approx([70, 20], abs=3)
    assert run.predictive(5, rows=[7, 2])["x"].mean(0).numpy() == pytest.approx([70, 20], abs=3)
    assert run.samples(5, rows=[7, 2])["mean"].shape == (5,)


def test_arviz_has_the_samples(line: SavedRun) -> None:
    arviz = pytest.importorskip("arviz", reason="ArviZ is not installed: make setup-dev installs it")
    data = line.to_arviz(10, rows=[0, 1])
    assert arviz.__version__
    assert data["posterior"]["slope"].shape == (1, 10) and data["posterior_predictive"]["y"].shape == (1, 10, 2)
    assert data["observed_data"]["y"].shape == (2,)


def test_import_of_distopt_stays_cheap() -> None:
    code = "import sys, distopt; assert 'torch' not in sys.modules; distopt.load_run; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)

"""The examples with data of their own on each worker, and the autoencoder, learn what the plain methods know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from distopt import backends
from distopt.config import RunConfig, load_config
from distopt.data import shard_rows
from distopt.examples.aircraft import Aircraft
from distopt.examples.ppca import Components, read_digits
from distopt.examples.vae import Autoencoder
from distopt.infer import SVI
from tests.workers import world

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "aircraft" else pytest.mark.slow)
        for name in sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    ],
)
def test_config_that_is_shipped_trains_and_reports(name: str, tmp_path: Path) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    assert isinstance(config, RunConfig) and config.name == name
    command = [sys.executable, "-m", "distopt.launch", "train", str(CONFIGS / f"{name}.yaml")]
    done = subprocess.run(
        [*command, "train.num_steps=3", f"run_dir={tmp_path}/run"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "report.html").exists()


def _train(make: Any, arguments: dict[str, Any], num_steps: int, lr: float) -> dict[str, Any]:
    """One rank's part of a short run of a task with sharded rows; returns what it found."""
    import pyro.infer

    from distopt import optim

    backend, task = backends.current(), make(**arguments)
    batch = task.batch(shard_rows(task.rows(), backend.rank, backend.world_size))
    distributed = optim.DistributedOptimizer(optim.ClippedAdam({"lr": lr, "lrd": 0.99}))
    svi = SVI(task.model, task.guide, distributed, pyro.infer.Trace_ELBO())
    svi.init(*batch)
    losses = [svi.step(*batch) for _ in range(num_steps)]
    result: dict[str, Any] = {"losses": losses}
    if make is Components:
        result["explained"] = task.explained()
    else:
        task.collect()
        result["effects"] = {name: value.numpy() for name, value in task.effects.items()}
    return result


@pytest.mark.slow
def test_components_explain_what_those_of_sklearn_do() -> None:
    first, second = world("torch_dist", 2).run(_train, Components, {"num_components": 3}, 250, 0.1, timeout_s=120)
    best = PCA(3).fit(read_digits().numpy()).explained_variance_ratio_.sum()
    assert first["losses"] == second["losses"]
    assert 0.95 * best < first["explained"] <= best + 1e-6


@pytest.mark.slow
@pytest.mark.timeout(300)  # each rank reads the file of all flights
def test_effects_of_all_aircraft_are_known_to_every_worker_at_the_end() -> None:
    arguments = {"num_flights": 2000}
    first, second = world("torch_dist", 2).run(_train, Aircraft, arguments, 30, 0.1, timeout_s=200)
    assert np.mean(first["losses"][-5:]) < np.mean(first["losses"][:5])
    task_effects = first["effects"]
    assert {name.split(".")[1] for name in task_effects} == {"locs", "scales"}
    for name, value in task_effects.items():
        assert value.shape == (4037,)
        np.testing.assert_array_equal(value, second["effects"][name])


def test_autoencoder_learns_to_draw_digits_from_their_place_on_the_map() -> None:
    import pyro.infer
    import pyro.optim

    task = Autoencoder(num_hidden=32)
    svi = SVI(task.model, task.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    before = task.error()
    for step in range(300):
        svi.step(*task.batch(np.random.default_rng(step).integers(0, task.rows(), 128)))
    assert task.error() < 0.06 < before

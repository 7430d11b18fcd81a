"""The flights model, aircraft split over workers, ends where one Pyro process with all flights ends."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.infer
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from distopt import backends, optim
from distopt.data import shard_rows
from distopt.examples.aircraft import Aircraft
from distopt.examples.flights import Flights
from distopt.infer import SVI
from tests.infer.sharded_models import float64, parameters_of_all
from tests.workers import world

NUM_FLIGHTS = 1500
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {"lr": 0.05}),
    "SGD": ("SGD", {"lr": 2e-6}),  # more, and a tau of thousands of effects collapses to 0, as posterior modes do
}


def _start(site: dict[str, Any]) -> Tensor:
    values = {"mu": -5.0, "sigma": 15.0, "nu": 4.0}
    shape = site["fn"].shape()
    default = 5.0 if site["name"].startswith("tau") else 0.0
    return torch.full(shape, values.get(site["name"], default))


Result = dict[str, tuple[dict[str, Any], float]]
"""By optimizer, the parameters and the last loss."""


def train_in_pyro(num_steps: int) -> Result:
    """Trains by Pyro alone, with all flights."""
    with float64():
        task, results = Flights(num_flights=NUM_FLIGHTS), {}
        batch = task.batch(np.arange(task.rows()))
        for optimizer, (kind, args) in OPTIMIZERS.items():
            pyro.clear_param_store()
            guide = AutoDelta(task.model, init_loc_fn=_start)
            svi = pyro.infer.SVI(task.model, guide, getattr(pyro.optim, kind)(args), pyro.infer.Trace_ELBO())
            losses = [svi.step(*batch) for _ in range(num_steps)]
            values = {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}
            results[optimizer] = (values, float(losses[-1]))
        return results


def _run_shard(num_steps: int) -> Result:
    """One rank's part of it; returns the same, the loss as SVI gives it."""
    backend = backends.current()
    with float64():
        task, results = Aircraft(num_flights=NUM_FLIGHTS), {}
        batch = task.batch(shard_rows(task.rows(), backend.rank, backend.world_size))
        for optimizer, (kind, args) in OPTIMIZERS.items():
            pyro.clear_param_store()
            guide = AutoDelta(task.model, init_loc_fn=_start)
            distributed = optim.DistributedOptimizer(getattr(optim, kind)(args))
            svi = SVI(task.model, guide, distributed, pyro.infer.Trace_ELBO())
            svi.init(*batch)
            made = set(pyro.get_param_store().keys())
            losses = [svi.step(*batch) for _ in range(num_steps)]
            assert made == set(pyro.get_param_store().keys()), "init had not made all parameters"
            values = {name: value.numpy() for name, value in parameters_of_all().items()}
            results[optimizer] = (values, losses[-1])
        return results


NUM_STEPS = 100


@cache
def expected() -> Result:
    """What Pyro finds."""
    return train_in_pyro(NUM_STEPS)


@pytest.mark.timeout(400)  # each rank reads the file of all flights
@pytest.mark.parametrize("world_size", [2, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 3, 4))])
def test_flights_with_aircraft_split_over_workers_give_the_parameters_of_one_pyro_process(world_size: int) -> None:
    alone = world_size == 1
    results = [_run_shard(NUM_STEPS)] if alone else world("torch_dist", world_size).run(_run_shard, NUM_STEPS)
    for params in results:
        for optimizer, (values, loss) in expected().items():
            assert params[optimizer][1] == pytest.approx(loss, rel=1e-9)
            assert params[optimizer][0].keys() == values.keys()
            for name, value in values.items():
                np.testing.assert_allclose(params[optimizer][0][name], value, rtol=1e-6, atol=1e-8, err_msg=name)

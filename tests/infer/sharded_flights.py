"""The flights model without noise: all data in one Pyro process, and aircraft split over ranks by distopt's SVI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.infer
import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from distopt import backends, optim
from distopt.data import shard_rows
from distopt.examples.aircraft import Aircraft
from distopt.examples.flights import Flights
from distopt.infer import SVI
from tests.infer.sharded_runs import float64, parameters_of_all

NUM_FLIGHTS = 1500
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {"Adam": ("Adam", {"lr": 0.05}), "SGD": ("SGD", {"lr": 1e-4})}


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


def train_shard(num_steps: int) -> Result:
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

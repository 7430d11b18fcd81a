"""The models of bench_step, in Pyro: each function returns (model, guide, batches, learning rate)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

NUM_BATCHES = 8
NUM_FACTORS = 24
NUM_LEVELS = 20
NUM_ROWS = 5_000
PLATE_SHAPE = (200_000, 8)

Workload = tuple[Any, Any, list[tuple[torch.Tensor, ...]], float]


def flights(num_rows: int = 8_192) -> Workload:
    """The example of the delays of flights: 23 sites."""
    from distopt.data import GlobalBatches
    from distopt.examples.flights import Flights

    task = Flights()
    batches = GlobalBatches(task.rows(), num_rows, 1)
    return task.model, task.guide, [task.batch(batches.rows(i)) for i in range(NUM_BATCHES)], 0.01


def flights_large() -> Workload:
    """The same with 131,072 rows a step."""
    return flights(131_072)


def hierarchy_data() -> tuple[np.ndarray, np.ndarray]:
    """Returns (NUM_ROWS, NUM_FACTORS) levels and (NUM_ROWS,) responses."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, NUM_LEVELS, (NUM_ROWS, NUM_FACTORS))
    effects = rng.normal(size=(NUM_FACTORS, NUM_LEVELS))
    response = 1.0 + effects[np.arange(NUM_FACTORS)[None], levels].sum(1) + rng.normal(size=NUM_ROWS)
    return levels, response.astype(np.float32)


def hierarchy() -> Workload:
    """51 sample sites over 5,000 rows."""
    levels, response = hierarchy_data()
    columns = [torch.from_numpy(levels[:, i].copy()) for i in range(NUM_FACTORS)]

    def model(response: torch.Tensor, *columns: torch.Tensor) -> None:
        loc = pyro.sample("mu", dist.Normal(0.0, 10.0))
        for i in range(NUM_FACTORS):
            tau = pyro.sample(f"tau_{i}", dist.HalfNormal(5.0))
            with pyro.plate(f"levels_{i}", NUM_LEVELS):
                effect = pyro.sample(f"effect_{i}", dist.Normal(0.0, tau))
            loc = loc + effect[columns[i]]
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(response)):
            pyro.sample("response", dist.Normal(loc, sigma), obs=response)

    return model, AutoNormal(model), [(torch.from_numpy(response), *columns)] * NUM_BATCHES, 0.01


def plate_data() -> np.ndarray:
    """Returns the observations of `plate`."""
    return (np.random.default_rng(0).normal(size=PLATE_SHAPE) + 1).astype(np.float32)


def plate() -> Workload:
    """200,000 latent variables of 8 dimensions."""

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(PLATE_SHAPE[1]), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return model, AutoNormal(model), [(torch.from_numpy(plate_data()),)] * NUM_BATCHES, 0.01


def vae() -> Workload:
    """The example of an autoencoder, 256 digits a step."""
    from distopt.data import GlobalBatches
    from distopt.examples.vae import Autoencoder

    task = Autoencoder()
    batches = GlobalBatches(task.rows(), 256, 1)
    return task.model, task.guide, [task.batch(batches.rows(i)) for i in range(NUM_BATCHES)], 0.003


# Rubin (1981): effects of coaching in eight schools, and their standard errors.
SCHOOLS = np.array([[28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]], np.float32)

# Efron and Morris (1975): hits of 18 baseball players in their first 45 times at bat.
HITS = np.array([18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7], np.float32)
AT_BATS = 45


def eight_schools() -> Workload:
    """The model of Pyro's example eight_schools."""

    def model(effects: torch.Tensor, errors: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        with pyro.plate("schools", len(effects)):
            theta = mu + tau * pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("effects", dist.Normal(theta, errors), obs=effects)

    return model, AutoNormal(model), [tuple(map(torch.from_numpy, SCHOOLS))] * NUM_BATCHES, 0.01


def baseball() -> Workload:
    """The partially pooled model of Pyro's example baseball."""

    def model(hits: torch.Tensor) -> None:
        mean = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", len(hits)):
            chance = pyro.sample("phi", dist.Beta(mean * kappa, (1 - mean) * kappa))
            pyro.sample("hits", dist.Binomial(AT_BATS, chance), obs=hits)

    return model, AutoNormal(model), [(torch.from_numpy(HITS),)] * NUM_BATCHES, 0.01


WORKLOADS = {
    "flights": flights,
    "51 sites": hierarchy,
    "vae": vae,
    "plate": plate,
    "flights 131,072": flights_large,
    "eight schools": eight_schools,
    "baseball": baseball,
}

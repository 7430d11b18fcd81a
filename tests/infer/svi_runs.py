"""What the ranks of the SVI tests do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro.infer.autoguide import AutoDelta, init_to_value

from distopt.backends import current
from distopt.data import GlobalBatches
from distopt.infer import SVI
from distopt.optim import Adam, DistributedOptimizer

NUM_ROWS = 11


def data() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).normal(2.0, 1.5, NUM_ROWS))


def model(y: torch.Tensor) -> None:
    zero, one = y.new_zeros(()), y.new_ones(())
    z = pyro.sample("z", dist.Normal(zero, 3 * one))
    scale = pyro.sample("scale", dist.LogNormal(zero, one))
    with pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def guide() -> Any:
    # New tensors for each guide: AutoDelta makes them its parameters, and the optimizer writes into those.
    start = {"z": torch.tensor(0.3, dtype=torch.float64), "scale": torch.tensor(1.2, dtype=torch.float64)}
    return AutoDelta(model, init_loc_fn=init_to_value(values=start))


def parameters() -> dict[str, float]:
    return {name: float(value.detach()) for name, value in pyro.get_param_store().items()}


def train(global_batch: int | None, num_steps: int) -> tuple[dict[str, float], list[float]]:
    """Parameters and losses after `num_steps` on this rank's part of each batch."""
    backend = current()
    batches = GlobalBatches(NUM_ROWS, global_batch, 3, backend.rank, backend.world_size)
    optimizer = DistributedOptimizer(Adam({"lr": 0.05}))
    svi = SVI(model, guide(), optimizer, pyro.infer.Trace_ELBO(), weight=batches.weight)
    losses = [svi.step(data()[batches.rows(step)]) for step in range(num_steps)]
    return parameters(), losses


def train_in_pyro(global_batch: int | None, num_steps: int) -> tuple[dict[str, float], list[float]]:
    """The same in one process, by Pyro alone but for the order of rows."""
    batches = GlobalBatches(NUM_ROWS, global_batch, 3)
    svi = pyro.infer.SVI(model, guide(), pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    losses = [svi.step(data()[batches.rows(step)]) for step in range(num_steps)]
    return parameters(), losses


def fail_on_rank_1() -> str:
    """The error that this rank sees when the model fails on rank 1, and whether a parameter has changed."""
    backend = current()
    svi = SVI(model, guide(), DistributedOptimizer(Adam({"lr": 0.05})), pyro.infer.Trace_ELBO())
    svi.step(data())
    before = parameters()

    def failing(y: torch.Tensor) -> None:
        if backend.rank == 1:
            raise ArithmeticError("the rows are rotten")
        model(y)

    svi.model = failing
    try:
        svi.step(data())
    except Exception as error:
        assert parameters() == before
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_tail_adaptive(num_steps: int) -> dict[str, float]:
    """Parameters after steps of TraceTailAdaptive_ELBO, which can compute no loss."""
    pyro.set_rng_seed(0)

    def normal(y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 3.0))
        with pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(z.unsqueeze(-1), 1.5), obs=y)

    def guide(y: torch.Tensor) -> None:
        loc, scale = pyro.param("loc", torch.zeros(())), pyro.param("log_scale", torch.zeros(())).exp()
        pyro.sample("z", dist.Normal(loc, scale))

    loss = pyro.infer.TraceTailAdaptive_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(normal, guide, DistributedOptimizer(Adam({"lr": 0.1})), loss)
    for _ in range(num_steps):
        svi.step(data().float())
    return parameters()

"""PowerSGD: what error feedback makes up for, and what may not disturb it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedOptimizer,
    ReduceOptions,
)
from tests.reduce.steps import Values, by_rank, random_values, step_with, store_values, unconstrained
from tests.workers import Ranks


def _run_power_sgd_converges_by_its_error_feedback() -> Values:
    """A fixed full-rank gradient arrives in full over some steps; a low-rank one at once; vectors are exact."""
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression="powersgd", power_sgd_rank=2))
    for name, shape in (("full", (12, 10)), ("low", (12, 10)), ("vector", (7,))):
        pyro.param(name, torch.zeros(shape))
    column, rows, vectors = random_values(5, 12, 1), by_rank(2, 1, 10), by_rank(3, 7)
    fulls = by_rank(4, 12, 10)
    num_steps = 60
    for _ in range(num_steps):
        step_with(optim, {"full": fulls[rank], "low": column @ rows[rank], "vector": vectors[rank]})
    means = {
        "full": torch.stack(fulls).mean(0),
        "low": column @ torch.stack(rows).mean(0),
        "vector": torch.stack(vectors).mean(0),
    }
    errors = {
        name: ((unconstrained(name) / -num_steps - mean).norm() / mean.norm()).item() for name, mean in means.items()
    }
    assert errors["vector"] < 1e-5 and errors["low"] < 1e-4 and errors["full"] < 0.25, errors
    return store_values()


def _run_power_sgd_keeps_its_errors_while_parameters_come_and_go() -> Values:
    """Steps without a parameter, and rounds thrown away for a new one, leave its own steps as they would be; a
    parameter of another shape takes an old name.
    """
    rank, size = current().rank, current().world_size
    gradient, other = by_rank(7, 12, 10)[rank], by_rank(8, 12, 10)[rank]

    def train(disturbed: bool) -> Tensor:
        pyro.clear_param_store()
        for name in ("x", "y"):
            pyro.param(name, torch.zeros(12, 10))
        optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression="powersgd", power_sgd_rank=1))
        for step in range(8):
            step_with(optim, {"x": gradient})
            if disturbed:
                step_with(optim, {"y": other})
            if disturbed and step == 4:
                pyro.get_param_store().setdefault("z", torch.zeros(3))
                step_with(optim, {"y": other} | ({"z": torch.ones(3)} if rank == size - 1 else {}))
        param = unconstrained("x")
        pyro.clear_param_store()
        pyro.param("x", torch.zeros(10, 9))
        step_with(optim, {"x": torch.ones(10, 9)})
        torch.testing.assert_close(unconstrained("x"), -torch.ones(10, 9))
        return param

    torch.testing.assert_close(train(True), train(False))
    return store_values()


BODIES = [
    _run_power_sgd_converges_by_its_error_feedback,
    _run_power_sgd_keeps_its_errors_while_parameters_come_and_go,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.removeprefix("_run_"))
def test_power_sgd_on_every_backend(ranks: Ranks, body: Callable[[], Any]) -> None:
    ranks.run_alike(body)

"""Averages that a loss keeps are those of all ranks: as in one Pyro process, at no further agreement."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.optim
import pytest
import torch
from pyro.infer import TraceGraph_ELBO

from distopt.backends import current
from distopt.optim import SGD, Adam, DistributedOptimizer, ReduceOptions
from tests.workers import world

BETA = 0.9
NAME = "__baseline_avg_downstream_cost_b"
Averages = list[float]


def model(x: torch.Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def guide(x: torch.Tensor) -> None:
    baseline = {"use_decaying_avg_baseline": True, "baseline_beta": BETA}
    pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))), infer={"baseline": baseline})


def train(svi: pyro.infer.SVI, num_steps: int, x: float = 0.5) -> tuple[Averages, float]:
    """The average after each step, and the parameter at the end."""
    averages = []
    for _ in range(num_steps):
        svi.step(torch.tensor(x))
        averages.append(pyro.param(NAME).item())
    return averages, pyro.param("p").item()


def _run_equal(num_steps: int, calls: int = 1) -> tuple[Averages, float, int]:
    """All ranks draw and read the same."""
    optim = DistributedOptimizer(
        Adam({"lr": 0.05}), noise="shared", reduce=ReduceOptions(backward_passes_per_step=calls)
    )
    result = train(pyro.infer.SVI(model, guide, optim, TraceGraph_ELBO()), num_steps)
    return *result, optim.reducer.num_agreements


def in_pyro(num_steps: int) -> tuple[Averages, float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return train(pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceGraph_ELBO()), num_steps)


@pytest.mark.parametrize("kind", [("single", 1), ("torch_dist", 2)], ids=str)
def test_ranks_that_draw_the_same_have_the_averages_of_one_pyro_process_in_every_bit(kind: tuple[str, int]) -> None:
    expected = in_pyro(12)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    results = [_run_equal(12)] if kind[1] == 1 else world(*kind).run(_run_equal, 12)
    for averages, p, num_agreements in results:
        assert (averages, p) == expected
        # Two: before the first step, and with the parameter that its loss has made.
        assert num_agreements <= 2


def cost(b: float, x: float) -> float:
    """What TraceGraph_ELBO averages: the terms below the site, in the model minus the guide."""
    value = torch.tensor(b)
    below = dist.Bernoulli(0.3).log_prob(value) + dist.Normal(value, 1.0).log_prob(torch.tensor(x))
    return float(below - dist.Bernoulli(0.4).log_prob(value))


def _run_unequal(num_steps: int, joins: bool) -> tuple[list[float], Averages, Averages, int]:
    """What this rank drew, the averages after each of its steps, its state at the end, and the agreements."""
    drawn: list[float] = []

    def drawing(x: torch.Tensor) -> None:
        guide(x)

    def noting(x: torch.Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.3))
        drawn.append(b.item())
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    rank = current().rank
    pyro.set_rng_seed(rank)
    optim = DistributedOptimizer(SGD({"lr": 0.0}))
    svi = pyro.infer.SVI(noting, drawing, optim, TraceGraph_ELBO())
    with optim.join():
        averages, _ = train(svi, num_steps // 2 if joins and rank == 1 else num_steps, x=0.5 + rank)
    return drawn[1:], averages, [pyro.param(NAME).item()], optim.reducer.num_agreements


@pytest.mark.parametrize("joins", [False, True])
def test_ranks_that_draw_and_read_otherwise_keep_the_average_over_all_of_them(joins: bool) -> None:
    first, second = world("torch_dist", 2).run(_run_unequal, 8, joins)
    expected, averages = 0.0, []
    for step in range(8):
        costs = [cost(first[0][step], 0.5)]
        if step < len(second[0]):
            costs.append(cost(second[0][step], 1.5))
        expected = (1 - BETA) * sum(costs) / len(costs) + BETA * expected
        averages.append(expected)
    assert first[1] == pytest.approx(averages, rel=1e-5)
    assert second[1] == first[1][: len(second[1])] and second[2] == first[2]
    assert max(first[3], second[3]) <= 2


def test_average_of_calls_that_make_one_step_is_kept() -> None:
    first, second = world("torch_dist", 2).run(_run_equal, 8, 2)
    assert first == second and first[2] <= 2
    assert len(set(first[0])) == 8, "each call moves it"


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_cost_that_is_not_finite_leaves_the_average_as_it_was() -> None:
    optim: Any = DistributedOptimizer(Adam({"lr": 0.05}, nonfinite="skip"))
    svi = pyro.infer.SVI(model, guide, optim, TraceGraph_ELBO())
    with pyro.validation_enabled(False):
        before = train(svi, 3)[0][-1]
        assert train(svi, 1, x=float("nan"))[0] == [before]
        after = train(svi, 1)[0][0]
    assert math.isfinite(after) and after != before

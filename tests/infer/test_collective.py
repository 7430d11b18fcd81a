"""docs/collective.md holds: what is collective is of all rows, and what one rank does alone is warned about once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from torch import Tensor

from distopt.backends import current
from distopt.infer import SVI, seed_all, sharded_plate
from distopt.optim import Adam, DistributedOptimizer
from distopt.optim.distributed import pyro_hooks
from distopt.rng import NoisePolicy
from tests.workers import world

DATA = torch.linspace(-1.0, 3.0, 8)


def model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 8, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def posterior_of(x: Tensor) -> None:
    """For samplers, which refuse to subsample."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def my_rows() -> Tensor:
    return DATA[4 * current().rank :][:4]


def trained(num_steps: int = 3, policy: NoisePolicy = "independent", seed: Callable[[int], None] | None = None) -> SVI:
    optim = DistributedOptimizer(Adam({"lr": 0.1}), noise=policy)
    svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
    for step in range(num_steps):
        if seed is not None:
            seed(step)
        svi.step(my_rows())
    return svi


def messages_of(run: Callable[[], Any]) -> list[str]:
    """What `run` warns of, called twice."""
    pyro_hooks._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run()
    return [str(each.message) for each in caught]


def _run_alone(name: str) -> list[str]:
    guide = trained().guide
    runs: dict[str, Callable[[], Any]] = {
        "MCMC": lambda: pyro.infer.MCMC(
            pyro.infer.NUTS(posterior_of), num_samples=1, warmup_steps=1, disable_progbar=True
        ).run(my_rows()),
        "StreamingMCMC": lambda: pyro.infer.mcmc.StreamingMCMC(
            pyro.infer.HMC(posterior_of), num_samples=1, warmup_steps=1, disable_progbar=True
        ).run(my_rows()),
        "Importance": lambda: pyro.infer.Importance(model, guide, num_samples=2).run(my_rows()),
        "WeighedPredictive": lambda: pyro.infer.WeighedPredictive(model, guide=guide, num_samples=2)(my_rows()),
    }
    return messages_of(runs[name])


@pytest.mark.parametrize("name", ["MCMC", "StreamingMCMC", "Importance", "WeighedPredictive"])
def test_inference_over_a_ranks_rows_warns_once_that_it_is_not_collective(name: str) -> None:
    for rank, messages in enumerate(world("torch_dist", 2).run(_run_alone, name)):
        warned = [text for text in messages if "not collective" in text]
        assert len(warned) == 1
        assert warned[0].startswith(f"rank {rank}: {name} is not collective: each of the 2 ranks computes it from")
        assert "run it on one rank with all rows" in warned[0]


def _run_predictive() -> tuple[list[str], list[float], dict[str, float], float]:
    svi = trained()
    predictive = pyro.infer.Predictive(model, guide=svi.guide, num_samples=50, return_sites=["loc"])
    draws = predictive(my_rows())["loc"].flatten().tolist()
    messages = messages_of(lambda: predictive(my_rows()))
    median = {name: value.item() for name, value in svi.guide.median().items()}
    return messages, draws, median, svi.evaluate_loss(my_rows())


def test_predictive_draws_from_one_guide_with_noise_of_each_rank_and_warns_of_nothing() -> None:
    (first, draws, median, loss), (second, other_draws, other_median, other_loss) = world("torch_dist", 2).run(
        _run_predictive
    )
    assert first == second == []
    assert median == other_median, "the guide is the same on all ranks"
    assert not set(draws) & set(other_draws), "samples are each rank's own"
    assert loss != other_loss


def equal_seed(step: int) -> None:
    pyro.set_rng_seed(step)


def seed_of_rank(step: int) -> None:
    seed_all(7, step, current().rank)


def _run_seeding(seed: Callable[[int], None], policy: NoisePolicy) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(10, policy, seed)
    return [str(each.message) for each in caught]


def test_seed_inside_the_loop_that_makes_ranks_draw_the_same_is_warned_about_once_with_the_line_to_write() -> None:
    for messages in world("torch_dist", 2).run(_run_seeding, equal_seed, "independent"):
        (warned,) = messages
        assert warned.startswith("step 1: the random generators of all ranks are in the same state")
        assert "seed_all(seed, step, distopt.init().rank)" in warned


@pytest.mark.parametrize(("seed", "policy"), [(seed_of_rank, "independent"), (equal_seed, "shared")])
def test_seeds_of_each_rank_and_noise_that_is_meant_to_be_equal_are_not_warned_about(
    seed: Callable[[int], None], policy: NoisePolicy
) -> None:
    assert world("torch_dist", 2).run(_run_seeding, seed, policy) == [[], []]


# The Laplace approximation of a regression, whose posterior is known in closed form.

NUM_ROWS = 8
PRIOR_SCALE, SCALE = 3.0, 0.5
SIZES = {"scaled": (4, 4), "sharded": (5, 3)}


def features() -> Tensor:
    steps = torch.arange(NUM_ROWS, dtype=torch.float64)
    return torch.stack([torch.ones_like(steps), steps / 4], dim=-1)


def targets() -> Tensor:
    return features() @ torch.tensor([0.5, -1.0], dtype=torch.float64) + 0.1 * torch.cos(features()[:, 1] * 7)


def scaled(x: Tensor, y: Tensor) -> None:
    regression(x, y, lambda: pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(y))))


def sharded(x: Tensor, y: Tensor) -> None:
    regression(x, y, lambda: sharded_plate("rows", len(y)))


def regression(x: Tensor, y: Tensor, make_plate: Callable[[], pyro.plate]) -> None:
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2).double(), PRIOR_SCALE).to_event(1))
    with make_plate():
        pyro.sample("y", dist.Normal(x @ weights, SCALE), obs=y)


def posterior() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the conjugate posterior of all rows (Bishop, Pattern Recognition, section 3.3)."""
    x = features()
    precision = torch.eye(2).double() / PRIOR_SCALE**2 + x.T @ x / SCALE**2
    covariance = precision.inverse()
    return covariance @ x.T @ targets() / SCALE**2, covariance


def _run_approximation(name: str) -> tuple[list[float], list[list[float]]]:
    first = sum(SIZES[name][: current().rank])
    rows = slice(first, first + SIZES[name][current().rank])
    model = globals()[name]
    guide = AutoLaplaceApproximation(model)
    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO())
    data = (features()[rows], targets()[rows])
    for _ in range(300):
        svi.step(*data)
    gaussian = guide.laplace_approximation(*data).get_posterior()
    return gaussian.mean.tolist(), gaussian.covariance_matrix.tolist()


@pytest.mark.parametrize("name", SIZES)
def test_two_ranks_have_mean_and_covariance_of_the_posterior_of_all_rows(name: str) -> None:
    mean, covariance = posterior()
    first, second = world("torch_dist", 2).run(_run_approximation, name)
    assert first == second
    torch.testing.assert_close(torch.tensor(first[0]).double(), mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(first[1]).double(), covariance, rtol=1e-6, atol=1e-9)

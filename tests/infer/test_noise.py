from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from distopt.infer import noise_seed, seed_noise


def drawn() -> tuple[float, float, float]:
    """A number of each generator that a model may use."""
    return float(torch.rand(())), float(np.random.rand()), random.random()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_ranks_of_a_step_and_steps_of_a_rank_draw_different_noise(seed: int) -> None:
    ranks = [noise_seed(seed, step=5, rank=rank) for rank in range(5000)]
    steps = [noise_seed(seed, step) for step in range(2000)]
    assert len(set(ranks)) == 5000, "a multiple of an odd stride comes again only after 2**32 ranks"
    assert len(set(steps)) == 2000
    assert all(0 <= each < 2**32 for each in ranks + steps)


def test_streams_of_neighbouring_ranks_are_uncorrelated() -> None:
    streams = []
    for rank in range(16):
        seed_noise(7, step=3, rank=rank)
        streams.append(torch.randn(20_000))
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(16)
    assert correlation.abs().max() < 5 / 20_000**0.5  # five standard errors, 120 pairs


def test_shared_policy_gives_every_rank_what_rank_0_draws() -> None:
    seed_noise(7, step=3, rank=0)
    expected = drawn()
    for rank in range(4):
        seed_noise(7, step=3, rank=rank, policy="shared")
        assert drawn() == expected


def test_noise_of_a_step_is_the_same_whatever_was_drawn_before() -> None:
    seed_noise(7, step=3, rank=1)
    expected = drawn()
    torch.rand(100), np.random.rand(100), random.random()
    seed_noise(7, step=3, rank=1)
    assert drawn() == expected


def gradient(rank: int, step: int) -> float:
    """Of a Normal guide's location, by the reparameterised ELBO of a Normal model: linear in the draw."""
    seed_noise(11, step, rank)
    loc = torch.tensor(0.5, requires_grad=True)
    z = dist.Normal(loc, 1.0).rsample()
    (-dist.Normal(0.0, 0.5).log_prob(z)).backward()
    return float(loc.grad)


def test_variance_of_the_mean_gradient_over_four_ranks_is_a_quarter_of_one_ranks() -> None:
    num_steps = 500
    ranks = np.array([[gradient(rank, step) for rank in range(4)] for step in range(num_steps)])
    ratio = ranks.mean(1).var() / ranks[:, 0].var()
    # Each variance of n normal draws has a relative standard error of sqrt(2 / n); the two share a part of the draws.
    assert ratio == pytest.approx(0.25, rel=4 * (2 * 2 / num_steps) ** 0.5)
    assert ranks[:, 0].var() == pytest.approx(16.0, rel=4 * (2 / num_steps) ** 0.5)  # (1 / 0.5**2)**2


def test_seeding_is_what_pyro_does_with_the_seed_of_rank_and_step() -> None:
    seed_noise(1, step=2, rank=3)
    expected = drawn()
    pyro.set_rng_seed(noise_seed(1, 2, 3))
    assert drawn() == expected

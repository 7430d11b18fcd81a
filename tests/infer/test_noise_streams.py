"""Noise of several workers: streams of their own lower the gradient's variance, a shared one keeps them in step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt import backends
from distopt.infer import SVI as DistributedSVI
from distopt.infer import noise_seed, seed_noise
from distopt.infer.sharded_plate import sharded_plate, share_plates
from distopt.optim import Adam, DistributedOptimizer
from distopt.rng import noise_state
from tests.workers import world

NUM_STEPS, FEW = 600, 40


def _model() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.5, 1.0, 3.0]))


def _gradients(policy: Any, num_steps: int) -> list[float]:
    """Returns this rank's gradient of the location at each step, at the same parameters."""
    rank, guide = backends.current().rank, AutoNormal(_model, init_scale=0.5)
    elbo, found = Trace_ELBO(), []
    guide()
    param = pyro.get_param_store().named_parameters().mapping["AutoNormal.locs.loc"]
    for step in range(num_steps):
        param.grad = None
        seed_noise(11, step, rank, policy)
        elbo.loss_and_grads(_model, guide)
        found.append(float(param.grad))
    return found


def test_variance_of_the_mean_gradient_of_four_workers_is_a_quarter_of_one_workers() -> None:
    independent = np.array(world("torch_dist", 4).run(_gradients, "independent", NUM_STEPS, timeout_s=150))
    alone = independent.var(axis=1, ddof=1).mean()
    ratio = independent.mean(axis=0).var(ddof=1) / alone
    # Of a normal variable the variance estimated from n draws has the relative standard error sqrt(2 / n).
    error = 0.25 * np.sqrt(2 / NUM_STEPS) * np.sqrt(1 + 1 / 4)
    assert abs(ratio - 0.25) < 4 * error
    correlation = np.corrcoef(independent)[np.triu_indices(4, 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(NUM_STEPS)
    again = np.array(world("torch_dist", 4).run(_gradients, "independent", FEW))
    assert (independent[:, :FEW] == again).all()


def test_shared_noise_is_that_of_one_worker_on_all() -> None:
    shared = np.array(world("torch_dist", 4).run(_gradients, "shared", FEW))
    assert (shared == shared[0]).all()


def test_seeds_of_ranks_and_steps_are_all_distinct() -> None:
    seeds = {noise_seed(3, step, rank) for step in range(300) for rank in range(64)}
    assert len(seeds) > 0.9999 * 300 * 64  # of 2**32, so two may meet by chance


def _draws(policy: Any) -> dict[str, Any]:
    """Returns what the guide draws on this rank, of a plate with more datapoints on higher ranks."""
    rank = backends.current().rank

    def model() -> None:
        pyro.sample("before", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with sharded_plate("rows", rank + 2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("after", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    model, guide = share_plates(model, AutoNormal(model, init_scale=1.0))
    guide()
    seed_noise(5, 1, rank, policy)
    trace = poutine.trace(guide).get_trace()
    return {name: trace.nodes[name]["value"].tolist() for name in ("before", "z", "after")}


def test_shared_noise_stays_in_step_around_datapoints_whose_noise_is_each_workers_own() -> None:
    shared = world("torch_dist", 3).run(_draws, "shared")
    assert len({tuple(each["before"]) for each in shared}) == len({tuple(each["after"]) for each in shared}) == 1
    assert len({tuple(each["z"][:2]) for each in shared}) == 3
    assert [len(each["z"]) for each in shared] == [2, 3, 4]
    assert shared == world("torch_dist", 3).run(_draws, "shared")
    independent = world("torch_dist", 3).run(_draws, "independent")
    assert len({tuple(each["before"]) for each in independent}) == 3


def _train(noise: Any, seed_stride: int) -> list[list[float]]:
    """Pyro's own SVI, seeded by the script; returns what each of torch, NumPy and Python draws after it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3 + seed_stride * backends.current().rank)
    guide = AutoNormal(_model)
    svi = SVI(_model, guide, DistributedOptimizer(Adam({"lr": 0.1}), noise=noise), Trace_ELBO())
    before = noise_state()
    svi.step()
    unseeded = torch.rand(2).tolist()
    for _ in range(3):
        svi.step()
    assert before != noise_state()
    return [unseeded, torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random()]]


def test_ranks_that_a_script_seeds_alike_draw_their_own_noise_unless_told_to_share_it() -> None:
    ranks = world("torch_dist", 4)
    own = ranks.run(_train, "independent", 0)
    for kind in range(4):
        assert len({str(draws[kind]) for draws in own}) == 4
    assert own == ranks.run(_train, "independent", 0)
    shared = ranks.run(_train, "shared", 0)
    assert all(draws == shared[0] for draws in shared)
    assert own[0] == shared[0]


def test_ranks_that_a_script_seeds_apart_keep_the_noise_they_have() -> None:
    ranks = world("torch_dist", 2)
    assert ranks.run(_train, "independent", 1) == ranks.run(_train, "shared", 1)


def _draws_of_the_runs_of_the_first_step() -> list[list[Any]]:
    """Returns what each kind of noise gave the model, run by run; on the backend's device too."""
    device, drawn = backends.current().device, []
    seed_noise(3, rank=backends.current().rank)

    def model() -> None:
        on_device = torch.rand(2, device=device).tolist()
        drawn.append([random.random(), np.random.rand(2).tolist(), torch.rand(2).tolist(), on_device])
        _model()

    DistributedSVI(model, AutoNormal(_model), DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO()).step()
    return drawn


def test_run_of_the_model_that_makes_its_parameters_leaves_every_kind_of_noise_to_the_first_step() -> None:
    for drawn in world("torch_dist", 2).run(_draws_of_the_runs_of_the_first_step):
        assert len(drawn) == 2
        assert drawn[0] == drawn[1]

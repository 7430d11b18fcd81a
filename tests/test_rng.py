"""Random numbers of several ranks: seeds and streams that differ, streams that are shared, and their saved state.

Streams that differ lower the gradient's variance, a shared one keeps the ranks in step.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt import backends
from distopt.infer import SVI as DistributedSVI
from distopt.infer.sharded_plate import sharded_plate, share_plates
from distopt.optim import Adam, DistributedOptimizer
from distopt.rng import (
    RankStream,
    begin_rank_stream,
    capture_rng_state,
    generator_digest,
    preserve_rng_during_setup,
    rank_seed,
    restore_rng_state,
    rng_state_digest,
    seed_all,
    seed_stream,
    separate_streams,
)
from tests.workers import world

CPU = torch.device("cpu")
NUM_STEPS, FEW = 600, 40


def drawn() -> tuple[float, float, float]:
    """A number of each generator that a model may use."""
    return float(torch.rand(())), float(np.random.rand()), random.random()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_ranks_of_a_step_and_steps_of_a_rank_draw_different_noise(seed: int) -> None:
    ranks = [rank_seed(seed, step=5, rank=rank) for rank in range(5000)]
    steps = [rank_seed(seed, step) for step in range(2000)]
    assert len(set(ranks)) == 5000, "a multiple of an odd stride comes again only after 2**32 ranks"
    assert len(set(steps)) == 2000
    assert all(0 <= each < 2**32 for each in ranks + steps)


def test_streams_of_neighbouring_ranks_are_uncorrelated() -> None:
    streams = []
    for rank in range(16):
        seed_all(7, step=3, rank=rank)
        streams.append(torch.randn(20_000))
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(16)
    assert correlation.abs().max() < 5 / 20_000**0.5  # five standard errors, 120 pairs


def test_shared_policy_gives_every_rank_what_rank_0_draws() -> None:
    seed_all(7, step=3, rank=0)
    expected = drawn()
    for rank in range(4):
        seed_all(7, step=3, rank=rank, policy="shared")
        assert drawn() == expected


def test_noise_of_a_step_is_the_same_whatever_was_drawn_before() -> None:
    seed_all(7, step=3, rank=1)
    expected = drawn()
    torch.rand(100), np.random.rand(100), random.random()
    seed_all(7, step=3, rank=1)
    assert drawn() == expected


def gradient(rank: int, step: int) -> float:
    """Of a Normal guide's location, by the reparameterised ELBO of a Normal model: linear in the draw."""
    seed_all(11, step, rank)
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
    seed_all(1, step=2, rank=3)
    expected = drawn()
    pyro.set_rng_seed(rank_seed(1, 2, 3))
    assert drawn() == expected


def _model() -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.5, 1.0, 3.0]))


def _gradients(policy: Any, num_steps: int) -> list[float]:
    """Returns this rank's gradient of the location at each step, at the same parameters."""
    rank, guide = backends.current().rank, AutoNormal(_model, init_scale=0.5)
    elbo, gradients = Trace_ELBO(), []
    guide()
    param = pyro.get_param_store().named_parameters().mapping["AutoNormal.locs.loc"]
    for step in range(num_steps):
        param.grad = None
        seed_all(11, step, rank, policy)
        elbo.loss_and_grads(_model, guide)
        gradients.append(float(param.grad))
    return gradients


@pytest.mark.slow
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
    seeds = {rank_seed(3, step, rank) for step in range(300) for rank in range(64)}
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
    seed_all(5, 1, rank, policy)
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


def _train(rng_policy: Any, seed_stride: int) -> list[list[float]]:
    """Pyro's own SVI, seeded by the script; returns what each of torch, NumPy and Python draws after it."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3 + seed_stride * backends.current().rank)
    guide = AutoNormal(_model)
    svi = SVI(_model, guide, DistributedOptimizer(Adam({"lr": 0.1}), noise=rng_policy), Trace_ELBO())
    before = generator_digest()
    svi.step()
    unseeded = torch.rand(2).tolist()
    for _ in range(3):
        svi.step()
    assert before != generator_digest()
    return [unseeded, torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random()]]


def test_ranks_that_a_script_seeds_alike_draw_their_own_noise_unless_told_to_share_it() -> None:
    ranks = world("torch_dist", 4)
    unshared = ranks.run(_train, "independent", 0)
    for kind in range(4):
        assert len({str(draws[kind]) for draws in unshared}) == 4
    assert unshared == ranks.run(_train, "independent", 0)
    shared = ranks.run(_train, "shared", 0)
    assert all(draws == shared[0] for draws in shared)
    assert unshared[0] == shared[0]


def test_ranks_that_a_script_seeds_apart_keep_the_noise_they_have() -> None:
    ranks = world("torch_dist", 2)
    assert ranks.run(_train, "independent", 1) == ranks.run(_train, "shared", 1)


def _draws_of_the_runs_of_the_first_step() -> list[list[Any]]:
    """Returns what each generator gave the model, run by run; on the backend's device too."""
    device, drawn = backends.current().device, []
    seed_all(3, rank=backends.current().rank)

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


def test_streams_when_they_are_equal_are_separated_and_the_first_one_stays() -> None:
    seed_all(3)
    first, state = generator_digest(), torch.get_rng_state()
    separate_streams([first, first, 5], 0)
    assert torch.equal(torch.get_rng_state(), state)
    separate_streams([5, 6, first], 2)
    assert torch.equal(torch.get_rng_state(), state)
    digests = [first]
    for rank in (1, 2):
        torch.set_rng_state(state)
        separate_streams([first, first, first], rank)
        digests.append(generator_digest())
    assert len(set(digests)) == 3


def test_rank_stream_leaves_the_shared_stream_where_it_would_be_whatever_was_drawn_in_it() -> None:
    following, inside = [], []
    for rank, count in ((0, 1), (1, 5), (1, 1000)):
        torch.manual_seed(9)
        stream = RankStream(rank)
        inside.append(torch.rand(count)[0].item())
        stream.end()
        following.append(torch.rand(3).tolist())
    assert following[0] == following[1] == following[2]
    assert inside[0] != inside[1] and inside[1] == inside[2]


def test_rank_stream_begins_only_where_the_ranks_share_theirs() -> None:
    seed_all(1, policy="independent")
    assert begin_rank_stream() is None
    seed_all(1, policy="shared")
    stream = begin_rank_stream()
    assert stream is not None
    stream.end()
    seed_all(1)
    assert begin_rank_stream() is None


def test_captured_state_when_restored_continues_with_the_same_numbers() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()]

    draw()  # gauss and randn keep half of a pair for the next call, which belongs to the state
    captured = json.loads(json.dumps(capture_rng_state(CPU)))
    expected = draw()
    assert draw() != expected
    restore_rng_state(captured, CPU)
    assert draw() == expected


def test_digest_of_a_captured_state_is_that_of_the_stream_and_its_point() -> None:
    seed_all(5)
    first = rng_state_digest(capture_rng_state(CPU))
    torch.rand(1)
    assert rng_state_digest(capture_rng_state(CPU)) != first
    seed_all(5)
    assert rng_state_digest(capture_rng_state(CPU)) == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("numpy"),
        lambda state: state["python"].update(words="***"),
        lambda state: state["python"].update(words=""),
        lambda state: state.update(torch=""),
        lambda state: state["numpy"].update(name="PCG64"),
        lambda state: state.update(python=None),
    ],
    ids=["missing", "no base64", "too few", "empty", "other generator", "null"],
)
def test_state_that_is_malformed_is_refused(damage: Any) -> None:
    captured = capture_rng_state(CPU)
    damage(captured)
    with pytest.raises(ValueError, match="state of the random number generators is malformed"):
        restore_rng_state(captured, CPU)


def test_stream_of_a_name_is_the_same_for_the_same_name_only() -> None:
    draws = []
    for name in ("a", "b", "a"):
        seed_stream(name, CPU)
        draws.append(drawn())
    assert draws[0] == draws[2] and all(one != other for one, other in zip(draws[0], draws[1], strict=True))


def test_setup_of_a_guide_that_is_preserved_draws_nothing_and_happens_once() -> None:
    guide = AutoNormal(_model)
    preserve_rng_during_setup([torch.nn.ModuleList([guide])], CPU)
    seed_all(4)
    expected = drawn()
    seed_all(4)
    guide._setup_prototype()
    assert guide.prototype_trace is not None
    assert drawn() == expected
    assert "_setup_prototype" not in vars(guide)
    preserve_rng_during_setup([guide], CPU)
    assert "_setup_prototype" not in vars(guide)  # it has been set up

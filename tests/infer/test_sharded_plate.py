"""The mean of the ranks' losses and gradients is that of Pyro with all the data, for every guide that can be split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoNormal,
    init_to_median,
)
from torch import Tensor
from torch.distributions import constraints

from distopt.infer.sharded_plate import shard, sharded_plate, share_plates
from distopt.sharding import LocalParameterError, local_parameters
from tests.infer.one_process import assert_same, gradients_of_all, gradients_of_ranks
from tests.infer.sharded_models import DATA, SHARDS, W, init, mixture, nested, normal_normal, outside

pytestmark = pytest.mark.usefixtures("same_draws_in_every_row")


@pytest.mark.parametrize("loss", [TraceMeanField_ELBO, TraceGraph_ELBO])
def test_gradients_agree_under_the_other_losses(loss: type[Trace_ELBO]) -> None:
    def run_shard(x: Tensor) -> float:
        sharded = shard(nested, "rows", num_shards=W)
        guide = shard(AutoNormal(sharded, init_loc_fn=init), "rows", num_shards=W)
        return float(loss().loss_and_grads(sharded, guide, x))

    gradients = gradients_of_ranks(run_shard, SHARDS)
    run_all = loss().loss_and_grads
    entries = local_parameters()
    assert_same(
        gradients,
        gradients_of_all(lambda x: float(run_all(nested, AutoNormal(nested, init_loc_fn=init), x)), DATA, entries),
    )


def test_enumeration_inside_a_sharded_plate_gives_the_gradients_of_all_data() -> None:
    def run(model: Any, plates: list[str], x: Tensor) -> float:
        guide: Any = AutoNormal(poutine.block(model, hide=["cluster"]), init_loc_fn=init)
        guide = shard(guide, plates, num_shards=W) if plates else guide
        return float(TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, x))

    gradients = gradients_of_ranks(lambda x: run(shard(mixture, "rows", num_shards=W), ["rows"], x), SHARDS)
    entries = local_parameters()
    assert_same(gradients, gradients_of_all(lambda x: run(mixture, [], x), DATA, entries))


def hand_written_guide(x: Tensor, plate: Callable[..., Any]) -> None:
    """Local parameters by Pyro's own rule: stated inside the plate, with event_dim."""
    loc = pyro.param("loc_loc", torch.tensor(0.1))
    pyro.sample("loc", dist.Normal(loc, 0.1))
    with plate("rows", len(x)):
        mean = pyro.param("z_loc", lambda: torch.zeros(len(x), 2), event_dim=1)
        scale = pyro.param("z_scale", lambda: torch.ones(len(x), 2), constraint=constraints.positive, event_dim=1)
        shift = pyro.param("shift", torch.zeros(2), event_dim=1)
        pyro.sample("z", dist.Normal(mean + shift, scale).to_event(1))


def test_hand_written_guide_with_sharded_plate_keeps_its_rows_and_shares_the_rest() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with sharded_plate("rows", len(x), num_shards=W):
            z = pyro.sample("z", dist.Normal(loc, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        hand_written_guide(x, lambda name, size: sharded_plate(name, size, num_shards=W))

    gradients = gradients_of_ranks(lambda x: float(Trace_ELBO().loss_and_grads(model, guide, x)), SHARDS)
    entries = local_parameters()
    assert set(entries) == {"z_loc", "z_scale"}
    expected = gradients_of_all(
        lambda x: float(Trace_ELBO().loss_and_grads(normal_normal, lambda x: hand_written_guide(x, pyro.plate), x)),
        DATA,
        entries,
    )
    assert_same(gradients, expected)


def subsampled(x: Tensor, index: Tensor) -> None:
    """A model that is told its minibatch by an index argument."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def test_mean_over_the_minibatches_of_unequal_shards_is_the_full_gradient() -> None:
    shards = DATA[:10].split([2, 6, 2])

    def plates(x: Tensor, index: Tensor) -> pyro.plate:
        return pyro.plate("rows", len(x), subsample=index)

    def run_shard(x: Tensor) -> float:
        model = shard(subsampled, "rows", num_shards=W)
        guide = shard(AutoNormal(model, init_loc_fn=init, create_plates=plates), "rows", num_shards=W)
        losses = []
        for index in torch.arange(len(x)).chunk(2):
            losses.append(float(Trace_ELBO().loss_and_grads(model, guide, x, index)))
        for param in dict(pyro.get_param_store().named_parameters()).values():
            param.grad = param.grad / 2
        return sum(losses) / 2

    gradients = gradients_of_ranks(run_shard, shards)
    entries = local_parameters()
    assert set(entries) == {"AutoNormal.locs.z", "AutoNormal.scales.z"}

    def run_all(x: Tensor) -> float:
        guide = AutoNormal(subsampled, init_loc_fn=init, create_plates=plates)
        return float(Trace_ELBO().loss_and_grads(subsampled, guide, x, torch.arange(len(x))))

    assert_same(gradients, gradients_of_all(run_all, DATA[:10], entries))


def test_subsample_size_draws_a_minibatch_of_the_shard_and_scales_it_to_all_ranks() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])

    sharded = shard(model, "rows", num_shards=4)
    guide = shard(AutoNormal(sharded), "rows", num_shards=4)
    trace = poutine.trace(guide).get_trace(DATA)
    trace = poutine.trace(poutine.replay(sharded, trace=trace)).get_trace(DATA)
    assert trace.nodes["x"]["scale"] == pytest.approx(4 * len(DATA) / 2)
    assert trace.nodes["z"]["value"].shape == (2,)
    assert local_parameters()["AutoNormal.locs.z"].shape == (len(DATA),)


def test_named_parameters_of_a_guide_outside_plates_get_the_gradient_of_all_data() -> None:
    def run_shard(x: Tensor) -> float:
        model = shard(normal_normal, "rows", num_shards=W)
        return float(Trace_ELBO().loss_and_grads(model, shard(outside, "rows", local={"z_loc": 0}, num_shards=W), x))

    gradients = gradients_of_ranks(run_shard, SHARDS)
    entries = local_parameters()
    run_all = Trace_ELBO().loss_and_grads
    assert_same(gradients, gradients_of_all(lambda x: float(run_all(normal_normal, outside, x)), DATA, entries))


def test_marks_end_with_the_parameters_they_were_made_for() -> None:
    model = shard(normal_normal, "rows", num_shards=W)
    Trace_ELBO().loss(model, shard(AutoDelta(model), "rows", num_shards=W), DATA)
    assert "AutoDelta.z" in local_parameters()
    pyro.clear_param_store()
    Trace_ELBO().loss(normal_normal, AutoDelta(normal_normal, init_loc_fn=init_to_median), DATA)
    assert "AutoDelta.z" not in local_parameters()


def test_prediction_with_an_unsharded_guide_works() -> None:
    model = shard(normal_normal, "rows", num_shards=W)
    guide = AutoNormal(model)
    guide(DATA)
    samples = pyro.infer.Predictive(model, guide=guide, num_samples=3)(DATA)
    assert samples["z"].shape == (3, len(DATA), 2)


@pytest.mark.parametrize("is_sharded", [True, False])
def test_weights_of_ranks_fall_on_what_is_not_sharded(is_sharded: bool) -> None:
    weights = [0.5, 1.4, 1.1]

    def run_shard(rank: int) -> float:
        model: Any = shard(normal_normal, "rows", num_shards=W) if is_sharded else normal_normal
        model, guide = share_plates(model, AutoNormal(model, init_loc_fn=init), weights[rank])
        return float(Trace_ELBO().loss_and_grads(model, guide, SHARDS[rank]))

    if is_sharded:
        gradients = gradients_of_ranks(run_shard, range(W))
        entries = local_parameters()
        run_all = Trace_ELBO().loss_and_grads
        expected = gradients_of_all(
            lambda x: float(run_all(normal_normal, AutoNormal(normal_normal, init_loc_fn=init), x)), DATA, entries
        )
        assert_same(gradients, expected)
    else:
        weighted, weights[1] = run_shard(1), 1.0
        pyro.clear_param_store()
        assert weighted == pytest.approx(1.4 * run_shard(1))


def test_parameter_inside_sharded_plate_without_event_dim_is_noticed_by_the_plate_itself() -> None:
    with pytest.raises(LocalParameterError, match=r"'z_loc' has shape \(11,\).*event_dim=0"):
        with sharded_plate("rows", 11, num_shards=W):
            pyro.param("z_loc", torch.zeros(11))


def test_rows_that_do_not_fit_the_plate_are_refused() -> None:
    with pytest.raises(LocalParameterError, match=r"4 datapoints.*shape \(3,\)"):
        sharded_plate("rows", 4, rows=[5, 6, 9], num_shards=W)


def test_plate_that_the_model_does_not_have_is_named_with_those_it_has() -> None:
    with pytest.raises(LocalParameterError, match="'cells'.*no such plate.*genes, rows"):
        shard(nested, "cells", num_shards=W)(DATA)

"""What cannot be sharded as it stands is refused, with the edit that mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGaussian,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

from distopt.infer.sharded_plate import shard, sharded_plate
from distopt.sharding import LocalParameterError, local_parameters
from tests.infer.sharded_models import DATA, W, nested, normal_normal, outside

pytestmark = pytest.mark.usefixtures("same_noise_in_every_row")

JOINT = [
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoLaplaceApproximation,
    AutoGaussian,
    AutoStructured,
]


@pytest.mark.parametrize("kind", JOINT)
def test_guide_of_one_joint_parameter_is_refused_with_the_one_to_use(kind: Any) -> None:
    model = shard(normal_normal, "rows", num_shards=W)
    guide = shard(kind(model), "rows", num_shards=W)
    with pytest.raises(LocalParameterError, match=r"sharded plate 'rows'.*(AutoNormal|conditionals=)"):
        Trace_ELBO().loss_and_grads(model, guide, DATA)


def test_structured_dependency_between_datapoints_is_refused() -> None:
    model = shard(nested, "rows", num_shards=W)
    kinds = {"scale": "normal", "z": "normal", "offset": "normal"}
    guide = AutoStructured(model, conditionals=kinds, dependencies={"z": {"offset": "linear"}})
    with pytest.raises(LocalParameterError, match="'z' depends on 'offset' by 'linear'"):
        Trace_ELBO().loss_and_grads(model, shard(guide, "rows", num_shards=W), DATA)


def test_guide_that_knows_nothing_of_the_plate_is_noticed_while_training() -> None:
    model = shard(normal_normal, "rows", num_shards=W)
    with pytest.raises(LocalParameterError, match="ordinary plate of that name.*factor of 3"):
        Trace_ELBO().loss_and_grads(model, AutoNormal(model), DATA)
    with torch.no_grad():
        Trace_ELBO().loss(model, AutoNormal(model), DATA)


def inside_without_event_dim(x: Tensor) -> None:
    """Inside the plate, but without the event_dim that says which dimensions are the plate's."""
    pyro.sample("loc", dist.Normal(pyro.param("loc_loc", torch.tensor(0.1)), 0.1))
    with pyro.plate("rows", len(x)):
        mean = pyro.param("z_loc", lambda: torch.zeros(len(x), 2))
        pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))


@pytest.mark.parametrize("guide", [outside, inside_without_event_dim])
def test_replicated_parameter_that_follows_the_shard_is_named_with_the_edit(guide: Callable[..., Any]) -> None:
    model = shard(normal_normal, "rows", num_shards=W)
    message = r"'z_loc' has shape \(11, 2\).*event_dim=1.*local=\{'z_loc': 0\}.*replicated=\['z_loc'\]"
    with pytest.raises(LocalParameterError, match=message):
        Trace_ELBO().loss_and_grads(model, shard(guide, "rows", num_shards=W), DATA)
    pyro.clear_param_store()
    named = shard(guide, "rows", local={"z_*": 0}, num_shards=W)
    Trace_ELBO().loss_and_grads(model, named, DATA)
    assert list(local_parameters()) == ["z_loc"]
    pyro.clear_param_store()
    Trace_ELBO().loss_and_grads(model, shard(guide, "rows", replicated=["z_loc"], num_shards=W), DATA)
    assert not local_parameters()


def test_parameter_inside_sharded_plate_without_event_dim_is_noticed_by_the_plate_itself() -> None:
    with pytest.raises(LocalParameterError, match=r"'z_loc' has shape \(11,\).*event_dim=0"):
        with sharded_plate("rows", 11, num_shards=W):
            pyro.param("z_loc", torch.zeros(11))


def test_plate_that_the_model_does_not_have_is_named_with_those_it_has() -> None:
    with pytest.raises(LocalParameterError, match="'cells'.*no such plate.*genes, rows"):
        shard(nested, "cells", num_shards=W)(DATA)


def test_plate_that_is_iterated_over_is_refused() -> None:
    def model() -> None:
        for i in pyro.plate("rows", 3):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(LocalParameterError, match="must be vectorized"):
        shard(model, "rows", num_shards=W)()


def test_rows_that_do_not_fit_the_plate_are_refused() -> None:
    with pytest.raises(LocalParameterError, match=r"4 datapoints.*shape \(3,\)"):
        sharded_plate("rows", 4, rows=[5, 6, 9], num_shards=W)

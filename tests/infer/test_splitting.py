"""Mistakes that a sharded plate finds in the sites and parameters of model and guide, each with its fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from distopt.infer.sharded_plate import shard
from distopt.sharding import LocalParameterError, local_parameters
from tests.infer.sharded_models import DATA, W, normal_normal, outside

pytestmark = pytest.mark.usefixtures("same_draws_in_every_row")


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


def test_plate_that_is_iterated_over_is_refused() -> None:
    def model() -> None:
        for i in pyro.plate("rows", 3):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(LocalParameterError, match="must be vectorized"):
        shard(model, "rows", num_shards=W)()

"""Autoguides over sharded plates give the gradients of all data, or an error that says which guide to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from distopt.infer.sharded_plate import shard
from distopt.sharding import LocalParameterError, local_parameters
from tests.infer.one_process import assert_same, gradients_of_all, gradients_of_ranks
from tests.infer.sharded_models import DATA, SHARDS, W, init, mixture, nested, normal_normal, two_plates

pytestmark = pytest.mark.usefixtures("same_draws_in_every_row")


def list_of_guides(model: Callable[..., Any]) -> AutoGuideList:
    """Full covariance for the global site, one normal per local one."""
    guide = AutoGuideList(model)
    guide.append(AutoMultivariateNormal(poutine.block(model, hide=["z"]), init_loc_fn=init))
    guide.append(AutoNormal(poutine.block(model, expose=["z"]), init_loc_fn=init))
    return guide


GUIDES: dict[str, tuple[Callable[[Tensor], None], Callable[..., Any]]] = {
    "AutoDelta": (normal_normal, lambda model: AutoDelta(model, init_loc_fn=init)),
    "AutoNormal": (normal_normal, lambda model: AutoNormal(model, init_loc_fn=init)),
    "AutoNormal nested": (nested, lambda model: AutoNormal(model, init_loc_fn=init)),
    "AutoNormal two plates": (two_plates, lambda model: AutoNormal(model, init_loc_fn=init)),
    "AutoNormalMessenger": (normal_normal, lambda model: AutoNormalMessenger(model, init_loc_fn=init)),
    "AutoNormalMessenger amortized": (
        normal_normal,
        lambda model: AutoNormalMessenger(model, init_loc_fn=init, amortized_plates=("rows",)),
    ),
    "AutoHierarchicalNormalMessenger": (
        normal_normal,
        lambda model: AutoHierarchicalNormalMessenger(model, init_loc_fn=init),
    ),
    "AutoRegressiveMessenger": (normal_normal, lambda model: AutoRegressiveMessenger(model, init_loc_fn=init)),
    "AutoStructured": (
        normal_normal,
        lambda model: AutoStructured(
            model,
            conditionals={"loc": "mvn", "z": "normal"},
            dependencies={"z": {"loc": "linear"}},
            init_loc_fn=init,
        ),
    ),
    "AutoStructured nested": (
        nested,
        lambda model: AutoStructured(
            model,
            conditionals={"scale": "normal", "z": "normal", "offset": "delta"},
            dependencies={"z": {"scale": "linear"}},
            init_loc_fn=init,
        ),
    ),
    "AutoGuideList": (normal_normal, list_of_guides),
}


@pytest.mark.parametrize("case", GUIDES)
def test_gradients_of_unequal_shards_are_those_of_one_process_with_all_data(case: str) -> None:
    model, make_guide = GUIDES[case]
    plates = ["rows", "ratings"] if model is two_plates else ["rows"]
    elbo = Trace_ELBO()
    seen: dict[str, Any] = {}

    def run_shard(x: Tensor) -> float:
        sharded = shard(model, plates, num_shards=W)
        loss = elbo.loss_and_grads(sharded, shard(make_guide(sharded), plates, num_shards=W), x)
        seen.update(local_parameters())
        return float(loss)

    gradients = gradients_of_ranks(run_shard, SHARDS)
    assert bool(seen) == ("amortized" not in case)
    assert all(any(fragment in name for fragment in ("z", "offset", "bias")) for name in seen)
    expected = gradients_of_all(lambda x: float(elbo.loss_and_grads(model, make_guide(model), x)), DATA, seen)
    assert_same(gradients, expected)
    assert any(grad.abs().max() > 1e-3 for grad in gradients.by_name.values())


def test_discrete_guide_keeps_the_probabilities_of_each_datapoint() -> None:
    def discrete(model: Any) -> AutoGuideList:
        guide = AutoGuideList(InitMessenger(init)(model))  # it sets the probabilities by a run of its own
        guide.append(AutoNormal(poutine.block(model, hide=["cluster"]), init_loc_fn=init))
        guide.append(AutoDiscreteParallel(poutine.block(InitMessenger(init)(model), expose=["cluster"])))
        return guide

    def run(model: Any, guide: Any, x: Tensor) -> float:
        return float(TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, x))

    def run_shard(x: Tensor) -> float:
        sharded = shard(mixture, "rows", num_shards=W)
        return run(sharded, shard(discrete(sharded), "rows", num_shards=W), x)

    gradients = gradients_of_ranks(run_shard, SHARDS)
    entries = local_parameters()
    assert "AutoGuideList.1.cluster_probs" in entries
    expected = gradients_of_all(lambda x: run(mixture, discrete(mixture), x), DATA, entries)
    assert_same(gradients, expected)


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

"""Models that mean something else on several ranks are found in their first step, and right ones are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from distopt import infer
from distopt.backends import current
from distopt.infer import shard, sharded_plate
from distopt.optim import Adam, DistributedOptimizer
from tests.workers import world

NUM_ROWS = 12


def my_rows() -> Tensor:
    return torch.linspace(-1.0, 3.0, NUM_ROWS)[current().rank :: current().world_size]


def unscaled(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("d", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def without_plate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    pyro.sample("x", dist.Normal(loc, 1.0).expand([len(x)]).to_event(1), obs=x)


def sequential(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    for i in pyro.plate("d", len(x)):
        pyro.sample(f"x_{i}", dist.Normal(loc, 1.0), obs=x[i])


def with_latents(x: Tensor) -> None:
    with pyro.plate("cells", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("d", NUM_ROWS, subsample_size=len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def scaled_by_hand(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.poutine.scale(scale=NUM_ROWS / len(x)), pyro.plate("d", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def split(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with sharded_plate("d", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def autoencoder(x: Tensor) -> None:
    net = pyro.module("net", torch.nn.Linear(2, len(x)))
    with pyro.plate("pictures", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(net(z)[..., 0], 1.0), obs=x)


def encoder(x: Tensor) -> None:
    net = pyro.module("encoder", torch.nn.Linear(1, len(x)))
    with pyro.plate("pictures", len(x)):
        pyro.sample("z", dist.Normal(net(x[:, None])[:, :2], 1.0).to_event(1))


def by_hand(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("cells", len(x)):
        pyro.sample("z", dist.Delta(loc))


def everything(x: Tensor) -> None:
    unscaled(torch.linspace(-1.0, 3.0, NUM_ROWS))


MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "unscaled": (unscaled, AutoDelta),
    "without plate": (without_plate, AutoDelta),
    "sequential": (sequential, AutoDelta),
    "latents": (with_latents, AutoNormal),
    "latents, joint guide": (with_latents, AutoMultivariateNormal),
    "latents, guide by hand": (with_latents, lambda model: by_hand),
    "scaled": (scaled, AutoDelta),
    "scaled by hand": (scaled_by_hand, AutoDelta),
    "split": (split, AutoDelta),
    "autoencoder": (autoencoder, lambda model: encoder),
    "all rows everywhere": (everything, AutoDelta),
}


def _run_warnings(name: str, kind: str) -> list[str]:
    model, make_guide = MODELS[name]
    make = SVI if kind == "pyro" else infer.SVI
    svi = make(model, make_guide(model), DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(my_rows())
    return [str(each.message) for each in caught]


UNSCALED = "the mean over the ranks counts the likelihood 1/2 beside the priors of 'loc', so the posterior is too wide."


@pytest.mark.parametrize("kind", ["pyro", "distopt"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unscaled", ["plate 'd' of size 6 on rank 0, 1", "pyro.plate('d', 12, subsample_size=6)", UNSCALED.lower()]),
        ("without plate", ["at 'x', in no plate", "sharded_plate('rows', len(x))"]),
        ("sequential", ["('x_0', 'x_1', 'x_2') in plate 'd' of size 6"]),
        ("latents", ["'AutoNormal.locs.z'", "shard(model, plates='cells')"]),
        ("latents, joint guide", ["shard(model, plates='cells')"]),
        ("latents, guide by hand", ["'loc' has a row for each", "shard(model, plates='cells')"]),
    ],
)
def test_rows_of_a_rank_that_nothing_scales_or_splits_are_warned_about(
    name: str, kind: str, expected: list[str]
) -> None:
    for rank, messages in enumerate(world("torch_dist", 2).run(_run_warnings, name, kind)):
        assert len(messages) == 1 and messages[0].startswith(
            f"rank {rank} of 2: the ranks have different observations"
        ), messages
        assert all(text in messages[0] or text in messages[0].lower() for text in expected), messages


@pytest.mark.parametrize("name", ["scaled", "scaled by hand", "split", "autoencoder", "all rows everywhere"])
def test_models_that_are_right_are_not_warned_about(name: str) -> None:
    kind = "distopt" if name == "split" else "pyro"
    assert world("torch_dist", 2).run(_run_warnings, name, kind) == [[], []]


def _run_sharded_latents() -> list[str]:
    model = shard(with_latents, plates="cells")
    svi = infer.SVI(model, AutoNormal(model), DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.step(my_rows())
    return [str(each.message) for each in caught]


def test_sharded_latents_are_not_warned_about() -> None:
    assert world("torch_dist", 2).run(_run_sharded_latents) == [[], []]

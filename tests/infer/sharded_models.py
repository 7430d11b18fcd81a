"""Models with plates to shard, the unequal shards of their data, and what training leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import constraints

from distopt.infer import gather_local
from distopt.sharding import local_parameters

DATA = torch.linspace(-2.0, 3.0, 11, dtype=torch.float64)
SHARDS = DATA.split([2, 5, 4])
W = len(SHARDS)


def init(site: dict[str, Any]) -> Tensor:
    """Starts every site at a value of its support that does not depend on noise."""
    shape = site["fn"].shape()
    if site["fn"].support is constraints.simplex:
        return torch.arange(1.0, shape[-1] + 1).softmax(-1).expand(shape)
    if site["fn"].support.is_discrete:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.full(shape, 0.4)


def normal_normal(x: Tensor) -> None:
    """Two numbers per datapoint, one mean over all."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)


def nested(x: Tensor) -> None:
    """A sharded plate inside and outside others, positive local variables."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    genes, rows = pyro.plate("genes", 3, dim=-2), pyro.plate("rows", len(x), dim=-1)
    with genes, rows:
        z = pyro.sample("z", dist.Gamma(2.0, scale))
    with rows:
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with genes:
            pyro.sample("x", dist.Normal(z + offset, 1.0), obs=x.expand(3, -1))


def two_plates(x: Tensor) -> None:
    """People, and the ratings each has given: two sharded plates of different sizes."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
    who = torch.arange(len(x)).repeat_interleave(2)
    with pyro.plate("ratings", 2 * len(x)):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[who] + bias, 0.5), obs=x[who])


@config_enumerate
def mixture(x: Tensor) -> None:
    """Three clusters, a local scale, and a membership that is summed out."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("clusters", 3):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0))
    with pyro.plate("rows", len(x)):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        cluster = pyro.sample("cluster", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[cluster], scale), obs=x)


def outside(x: Tensor) -> None:
    """A guide as many are written: rows of parameters, stated outside the plate."""
    pyro.sample("loc", dist.Normal(pyro.param("loc_loc", torch.tensor(0.1)), 0.1))
    mean = pyro.param("z_loc", lambda: torch.zeros(len(x), 2))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))


@contextmanager
def float64() -> Iterator[None]:
    """Computes in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def parameters_of_all() -> dict[str, Tensor]:
    """Returns this rank's replicated parameters, and the local ones of all ranks."""
    local = local_parameters()
    params = {name: value.detach().clone() for name, value in pyro.get_param_store().items() if name not in local}
    for name in local:
        params |= gather_local(name)
    return params

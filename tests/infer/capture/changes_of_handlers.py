"""Handlers and distributions that change between steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from tests.infer.capture.changes import Prior, case, observe


@case
def handler_made_in_each_step():
    prior = Prior()

    def model():
        with poutine.scale(scale=prior.scale):
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return model, lambda: setattr(prior, "scale", 0.5)


@case
def data_of_a_condition():
    data = {"loc": torch.ones(())}

    def inner():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.LogNormal(0.0, 1.0)))

    return poutine.condition(inner, data), lambda: data.update(loc=torch.tensor(3.0))


@case
def data_of_a_condition_within():
    data = {"loc": torch.ones(())}
    handler = poutine.condition(data=data)

    def model():
        with handler:
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.LogNormal(0.0, 1.0)))

    return model, lambda: handler.data.update(loc=torch.tensor(3.0))


@case
def mask_of_a_handler():
    handler = poutine.mask(mask=torch.tensor(True))

    def model():
        with handler:
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return model, lambda: setattr(handler, "mask", torch.tensor(False))


@case
def reparameterization():
    strategy = LocScaleReparam(0.0)

    def inner():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        observe(pyro.sample("loc", dist.Normal(0.0, scale)))

    return poutine.reparam(inner, {"loc": strategy}), lambda: setattr(strategy, "centered", 0.5)


@case
def hidden_sites():
    hidden = {"other"}

    def inner():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))
        with poutine.block(hide_fn=lambda site: site["name"] in hidden):
            pyro.factor("more", torch.ones(()))

    return inner, lambda: hidden.add("more")


@case
def wrapped_handlers():
    handler = poutine.scale(scale=0.5)

    def inner():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return poutine.mask(handler(inner), mask=torch.tensor(True)), lambda: setattr(handler, "scale", 0.25)


@case
def distribution_in_a_container():
    priors = {"loc": [dist.Normal(0.0, 1.0)]}

    def model():
        for each in priors["loc"]:
            observe(pyro.sample("loc", each))

    return model, lambda: setattr(priors["loc"][0], "scale", torch.tensor(0.5))


@case
def base_of_a_distribution():
    prior = dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1)

    def model():
        observe(pyro.sample("loc", prior).sum())

    return model, lambda: setattr(prior.base_dist, "scale", torch.full((2,), 0.5))


@case
def transform_of_a_distribution():
    transform = dist.transforms.AffineTransform(0.0, 1.0)
    prior = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])

    def model():
        observe(pyro.sample("loc", prior))

    return model, lambda: setattr(transform, "scale", 0.5)


@case
def distribution_of_the_user():
    class Weighted(dist.Normal):
        factor = 1.0

        def log_prob(self, value):
            return super().log_prob(value) * Weighted.factor

    def model():
        observe(pyro.sample("loc", Weighted(0.0, 1.0)))

    return model, lambda: setattr(Weighted, "factor", 0.5)


@case
def size_of_a_plate():
    plate = pyro.plate("rows", 3)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with plate:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(3))

    return model, lambda: setattr(plate, "scale", 5.0)


@case
def subsample_of_a_plate():
    rows = torch.arange(3)
    data = torch.arange(10.0)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample=rows) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data[index])

    return model, lambda: rows.add_(2)

"""Models put together at random: a captured run equals the eager one in every bit, or is refused."""

import copy
import dataclasses
import random
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

from tests.infer.capture.cases import Case
from tests.infer.capture.steps import compare

PRIORS = [
    lambda scale: dist.Normal(0.0, scale),
    lambda scale: dist.Normal(torch.zeros(2), scale).to_event(1),
    lambda scale: dist.LogNormal(0.0, 1.0),
    lambda scale: dist.HalfNormal(2.0),
    lambda scale: dist.Gamma(2.0, 1.0),
    lambda scale: dist.Beta(2.0, 3.0),
    lambda scale: dist.Exponential(1.0),
    lambda scale: dist.StudentT(4.0, 0.0, scale),
    lambda scale: dist.Laplace(0.0, scale),
    lambda scale: dist.Dirichlet(torch.ones(3)),
    lambda scale: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    lambda scale: dist.Uniform(-1.0, 1.0),
]
LIKELIHOODS = [
    lambda loc, x: (dist.Normal(loc, 1.0), x),
    lambda loc, x: (dist.StudentT(3.0, loc, 2.0), x),
    lambda loc, x: (dist.Laplace(loc, 1.0), x),
    lambda loc, x: (dist.Bernoulli(logits=loc), (x > 0).float()),
    lambda loc, x: (dist.Poisson(loc.clamp(-3.0, 3.0).exp()), x.abs().round()),
    lambda loc, x: (dist.Binomial(5, logits=loc), x.abs().round().clamp(max=5.0)),
]
COMBINE = [
    lambda a, b: a + b.sum(),
    lambda a, b: a * (1.0 + b.mean()),
    lambda a, b: a - torch.tanh(b).sum(),
    lambda a, b: torch.where(a > 0, a, a * b.sum()),
    lambda a, b: a + torch.logsumexp(b.reshape(-1), 0),
]


@dataclasses.dataclass
class Annealing:
    factor: float = 1.0


def attribute_number():
    holder = Annealing()
    return lambda: holder.factor, lambda value: setattr(holder, "factor", value)


def closure_number():
    factor = 1.0

    def write(value):
        nonlocal factor
        factor = value

    return lambda: factor, write


def listed_number():
    factors = [Annealing(), Annealing()]

    def read():
        total = 0.0
        for each in factors:
            total += each.factor
        return total / 2

    return read, lambda value: setattr(factors[1], "factor", value)


def dictionary_number():
    settings = {"prior": {"factors": [1.0, 1.0]}}
    return (
        lambda: sum(sum(each) for each in settings["prior"].values()) / 2,
        lambda value: settings["prior"]["factors"].__setitem__(0, value),
    )


def array_number():
    factors = np.ones(3)
    return lambda: float(factors.mean()), lambda value: factors.__setitem__(1, value)


def default_number():
    def read(holder=types.SimpleNamespace(factor=1.0)):  # noqa: B008
        return holder.factor

    return read, lambda value: setattr(read.__defaults__[0], "factor", value)


def tensor_number():
    factor = torch.ones(())
    return lambda: factor, factor.fill_


NUMBERS = [
    *(attribute_number, closure_number, listed_number, dictionary_number, array_number, default_number, tensor_number)
]
SCHEDULES = [
    lambda i: 1.0,
    lambda i: 1.0 if i < 6 else 0.5,
    lambda i: min(1.0, 0.1 + i / 8),
    lambda i: (1.0, 0.5)[i % 2],
    lambda i: 0.5 if i == 7 else 1.0,
    lambda i: 1.0 / (1 + i // 5),
]


class Changing:
    """A number that a model reads, and layers that it calls, which change from step to step."""

    def __init__(self, choose: random.Random) -> None:
        self.read, self._write = choose.choice(NUMBERS)()
        self._schedule = choose.choice(SCHEDULES)
        self._evaluated = choose.choice([lambda i: False, lambda i: True, lambda i: i > 6, lambda i: i % 3 == 0])
        layers = [nn.Linear(1, 3)]
        layers += [nn.Dropout(0.3)] if choose.random() < 0.5 else []
        layers += [nn.BatchNorm1d(3)] if choose.random() < 0.3 else []
        self.net = nn.Sequential(*layers, nn.Softplus(), nn.Linear(3, 1)) if choose.random() < 0.4 else None
        self._state = None if self.net is None else copy.deepcopy(self.net.state_dict())

    def before_step(self, i: int) -> None:
        """Changes what is due at a step; the first one begins anew."""
        self._write(self._schedule(i))
        if self.net is None:
            return
        self.net.train(not self._evaluated(i))
        if i == 0 and not pyro.get_param_store().keys():
            self.net.load_state_dict(self._state)
            self.net.zero_grad(set_to_none=True)


def random_case(seed: int) -> Case:
    """Returns a model of one to five latent sites, plates, scales, masks, subsampling, enumeration and changes."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    changing = Changing(choose)
    sites = [
        (choose.choice(PRIORS), choose.choice([0, 0, 2, 5]), choose.choice(COMBINE))
        for _ in range(choose.randint(1, 5))
    ]
    likelihood = choose.choice(LIKELIHOODS)
    enumerated = choose.random() < 0.2
    subsample = choose.choice([None, None, 7])
    scale = choose.choice([None, 0.5, 3.0])
    masked = choose.random() < 0.3
    branches = choose.random() < 0.15
    num_rows = choose.choice([12, 12, 30, 30, 3000])  # the last so many that arithmetic is done in loops over blocks
    data = torch.randn(num_rows, generator=torch.Generator().manual_seed(seed))

    def model(x):
        loc = torch.zeros(())
        if changing.net is not None:
            pyro.module("net", changing.net)
        for i, (prior, size, combine) in enumerate(sites):
            if size:
                with pyro.plate(f"plate_{i}", size, dim=-1):
                    value = pyro.sample(f"site_{i}", prior(1.0 + i))
            else:
                value = pyro.sample(f"site_{i}", prior(1.0 + i))
            loc = combine(loc, value)
        if branches and loc > 0.3:
            loc = loc * 0.5
        if changing.net is not None:
            loc = loc + changing.net(x[:4, None]).mean()
        with (
            poutine.scale(scale=changing.read() * (scale or 1.0)),
            pyro.plate("rows", len(x), subsample_size=subsample, dim=-1) as rows,
        ):
            x = x[rows] if subsample else x
            if enumerated:
                loc = loc + pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))).float()
            distribution, observed = likelihood(loc, x)
            with poutine.mask(mask=x > -1.0) if masked else poutine.scale(scale=1.0):
                pyro.sample("x", distribution.expand_by(()) if enumerated else distribution, obs=observed)

    if enumerated:
        exposed = poutine.block(config_enumerate(model), hide=["z"])
        return Case(
            lambda: TraceEnum_ELBO(max_plate_nesting=1),
            config_enumerate(model),
            lambda m: AutoNormal(exposed),
            (data,),
            changing.before_step,
        )
    elbo = choose.choice(
        [
            Trace_ELBO,
            lambda: Trace_ELBO(num_particles=2),
            lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
            TraceGraph_ELBO,
            TraceMeanField_ELBO,
            lambda: RenyiELBO(alpha=0.5, num_particles=2),
        ]
    )
    guides = [AutoNormal, AutoNormal, AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal]
    guide = choose.choice(guides if num_rows < 3000 else guides[:3])
    sites_only = poutine.block(model, hide_fn=lambda site: site["type"] == "param")
    return Case(elbo, model, lambda m: guide(sites_only), (data,), changing.before_step)


def check(seed: int) -> bool:
    """Compares one random model, and returns whether it was captured."""
    case = random_case(seed)
    capture = compare(case, 20, seed=seed, keep_grads=bool(seed % 2))
    if capture.num_captured == 0:
        assert capture.refusal is not None or capture.num_recorded >= 5  # its branch never went one way twice
    return capture.num_captured > 0


@pytest.mark.sampled(6)
@pytest.mark.parametrize("seed", range(24))
def test_random_model_is_equal_or_refused(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thousands_of_random_models_are_equal_or_refused():
    captured = sum(check(seed) for seed in range(100, 2100))
    assert captured > 1800  # the others take another branch each time, or more values than eight

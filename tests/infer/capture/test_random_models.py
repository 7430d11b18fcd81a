"""Models put together at random: a captured run equals the eager one in every bit, or is refused."""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

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


def random_case(seed: int) -> Case:
    """Returns a model of one to five latent sites, plates, scales, masks, subsampling and enumeration."""
    choose = random.Random(seed)
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
    data = torch.randn(choose.choice([12, 30]), generator=torch.Generator().manual_seed(seed))

    def model(x):
        loc = torch.zeros(())
        for i, (prior, size, combine) in enumerate(sites):
            if size:
                with pyro.plate(f"plate_{i}", size, dim=-1):
                    value = pyro.sample(f"site_{i}", prior(1.0 + i))
            else:
                value = pyro.sample(f"site_{i}", prior(1.0 + i))
            loc = combine(loc, value)
        if branches and loc > 0.3:
            loc = loc * 0.5
        with poutine.scale(scale=scale or 1.0), pyro.plate("rows", len(x), subsample_size=subsample, dim=-1) as rows:
            x = x[rows] if subsample else x
            if enumerated:
                loc = loc + pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))).float()
            distribution, observed = likelihood(loc, x)
            with poutine.mask(mask=x > -1.0) if masked else poutine.scale(scale=1.0):
                pyro.sample("x", distribution.expand_by(()) if enumerated else distribution, obs=observed)

    if enumerated:
        exposed = poutine.block(config_enumerate(model), hide=["z"])
        return Case(
            lambda: TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(model), lambda m: AutoNormal(exposed), (data,)
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
    guide = choose.choice([AutoNormal, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta])
    return Case(elbo, model, guide, (data,))


def check(seed: int) -> bool:
    """Compares one random model, and returns whether it was captured."""
    case = random_case(seed)
    capture = compare(case, 10, seed=seed, keep_grads=bool(seed % 2))
    if capture.num_captured == 0:
        assert capture.refusal is not None or capture.num_recorded >= 5  # its branch never went one way twice
    return capture.num_captured > 0


@pytest.mark.parametrize("seed", range(24))
def test_random_model_is_equal_or_refused(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thousands_of_random_models_are_equal_or_refused():
    captured = sum(check(seed) for seed in range(100, 2100))
    assert captured > 1600

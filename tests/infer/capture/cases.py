"""Models, guides and ELBOs of all kinds, each as a step to capture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import (
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

DATA = torch.randn(60, generator=torch.Generator().manual_seed(1))


@dataclass
class Case:
    """A step: its guide is made anew for each run."""

    elbo: Callable[[], Any]
    model: Callable[..., Any]
    guide: Callable[[Any], Any]
    args: tuple[Any, ...] = (DATA,)
    before_step: Callable[[int], None] | None = None


def normal(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def scaled(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with poutine.scale(scale=2.5), pyro.plate("rows", len(x)):
        pyro.sample("x", dist.StudentT(3.0, loc.sum(), sigma), obs=x)


def subsampled(x):
    with pyro.plate("rows", len(x), subsample_size=10) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def regression(x):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    features = torch.stack([x, x**2, x.sin(), torch.ones_like(x)], -1)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=features @ weight), obs=(x > 0).float())


def hierarchy(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    group = torch.arange(len(x)) % 5
    for i in range(3):
        tau = pyro.sample(f"tau_{i}", dist.HalfNormal(5.0))
        with pyro.plate(f"groups_{i}", 5):
            effect = pyro.sample(f"effect_{i}", dist.Normal(0.0, tau))
        loc = loc + effect[group]
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@config_enumerate
def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def mixture_guide(model):
    return AutoNormal(poutine.block(model, hide=["z"]))


@config_enumerate
def hidden_markov(y):
    transitions = pyro.sample("transitions", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z{t}", dist.Categorical(transitions[z]))
        pyro.sample(f"y{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def hidden_markov_guide(model):
    return AutoNormal(poutine.block(model, expose=["transitions", "loc"]))


def coin(x):
    b = pyro.sample("b", dist.Bernoulli(0.3))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def coin_guide(x):
    pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))))


def coins(x):
    with pyro.plate("rows", len(x)):
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def coins_guide(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.full((len(x),), 0.4))))


def gamma(x):
    loc = pyro.sample("loc", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def gamma_guide(x):
    pyro.sample("loc", dist.Gamma(pyro.param("a", torch.tensor(2.0)).exp(), 1.0))


def count(x):
    n = pyro.sample("n", dist.Poisson(3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def count_guide(x):
    pyro.sample("n", dist.Poisson(pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)))


def correlated(x):
    cholesky = pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(3)).to_event(1))
    with pyro.plate("rows", len(x) // 3):
        matrix = scale[:, None] * cholesky
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=matrix), obs=x.view(-1, 3))


def factors(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("prior", -(loc**2))
    with pyro.plate("rows", len(x)), poutine.mask(mask=x > 0):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def writes_in_place(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    locs = torch.zeros(len(x))
    locs[:30] = loc
    locs[30:] += 2 * loc
    locs.mul_(2.0)
    shifts = torch.tensor([1.0, 2.0])
    shifts += loc
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(locs + shifts.sum(), 1.0), obs=x)


def autoregressive(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    level = torch.zeros(())
    levels = []
    for t in range(8):
        level = 0.5 * level + loc * x[t]
        levels.append(level)
    pyro.sample("x", dist.Normal(torch.stack(levels), 1.0).to_event(1), obs=x[:8])


class Network:
    """A model with layers: dropout draws, and batch norm moves its buffers in training."""

    def __init__(self):
        torch.manual_seed(5)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(1, 4),
            torch.nn.Dropout(0.5),
            torch.nn.BatchNorm1d(4),
            torch.nn.Tanh(),
            torch.nn.Linear(4, 1),
        )

    def __call__(self, x):
        pyro.module("layers", self.layers)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc + self.layers(x[:, None])[:, 0], 1.0), obs=x)


class Autoencoder:
    """Two networks, one in the model and one in the guide."""

    def __init__(self):
        torch.manual_seed(6)
        self.decoder = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Softplus(), torch.nn.Linear(8, 6))
        self.encoder = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Softplus(), torch.nn.Linear(8, 4))

    def __call__(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", 10):
            z = pyro.sample("z", dist.Normal(torch.zeros(10, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=(x.view(10, 6) > 0).float())

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("rows", 10):
            loc, scale = self.encoder(x.view(10, 6)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, torch.nn.functional.softplus(scale)).to_event(1))


class Bayesian(pyro.nn.PyroModule):
    """A PyroModule whose weights are samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.linear = pyro.nn.PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.sigma = pyro.nn.PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x):
        loc = self.linear(x[:, None])[:, 0]
        with pyro.plate("rows", len(x)):
            return pyro.sample("x", dist.Normal(loc, self.sigma), obs=x)


def captured_cases() -> dict[str, Case]:
    """Steps that must run from a program."""
    autoencoder = Autoencoder()
    evaluated = Network()
    evaluated.layers.eval()
    return {
        "Trace": Case(Trace_ELBO, normal, AutoNormal),
        "Trace, 3 particles": Case(lambda: Trace_ELBO(num_particles=3), normal, AutoNormal),
        "Trace, vectorized particles": Case(
            lambda: Trace_ELBO(num_particles=3, vectorize_particles=True), normal, AutoNormal
        ),
        "TraceMeanField": Case(TraceMeanField_ELBO, normal, AutoNormal),
        "TraceMeanField, 3 particles": Case(lambda: TraceMeanField_ELBO(num_particles=3), scaled, AutoNormal),
        "Renyi": Case(lambda: RenyiELBO(alpha=0.5, num_particles=3), normal, AutoNormal),
        "Renyi, vectorized": Case(
            lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True), normal, AutoNormal
        ),
        "TraceGraph": Case(TraceGraph_ELBO, normal, AutoNormal),
        "TraceGraph, score function": Case(TraceGraph_ELBO, coin, lambda model: coin_guide),
        "TraceGraph, score function in a plate": Case(TraceGraph_ELBO, coins, lambda model: coins_guide),
        "Trace, score function": Case(Trace_ELBO, coin, lambda model: coin_guide),
        "Trace, score function in a plate": Case(Trace_ELBO, coins, lambda model: coins_guide),
        "TraceEnum, mixture": Case(lambda: TraceEnum_ELBO(max_plate_nesting=1), mixture, mixture_guide),
        "TraceEnum, hidden Markov": Case(
            lambda: TraceEnum_ELBO(max_plate_nesting=0), hidden_markov, hidden_markov_guide, (DATA[:6],)
        ),
        "TraceEnum, guide": Case(
            lambda: TraceEnum_ELBO(max_plate_nesting=1), coins, lambda model: config_enumerate(coins_guide)
        ),
        "TraceTMC": Case(
            lambda: TraceTMC_ELBO(max_plate_nesting=1), config_enumerate(mixture, default="parallel"), mixture_guide
        ),
        "TailAdaptive": Case(
            lambda: TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True), normal, AutoNormal
        ),
        "hierarchy": Case(Trace_ELBO, hierarchy, AutoNormal),
        "scale, StudentT": Case(Trace_ELBO, scaled, AutoDiagonalNormal),
        "logistic regression": Case(Trace_ELBO, regression, AutoNormal),
        "subsampled plate": Case(Trace_ELBO, subsampled, AutoNormal),
        "Gamma guide": Case(Trace_ELBO, gamma, lambda model: gamma_guide),
        "Poisson guide": Case(Trace_ELBO, count, lambda model: count_guide),
        "LKJ": Case(Trace_ELBO, correlated, AutoNormal),
        "AutoMultivariateNormal": Case(Trace_ELBO, scaled, AutoMultivariateNormal),
        "AutoLowRank": Case(Trace_ELBO, correlated, AutoLowRankMultivariateNormal),
        "AutoLaplace": Case(Trace_ELBO, normal, AutoLaplaceApproximation),
        "AutoDelta": Case(Trace_ELBO, normal, AutoDelta),
        "AutoIAF": Case(Trace_ELBO, correlated, AutoIAFNormal),
        "AutoStructured": Case(Trace_ELBO, correlated, AutoStructured),
        "factor, mask by data": Case(Trace_ELBO, factors, AutoNormal),
        "writes in place": Case(Trace_ELBO, writes_in_place, AutoNormal),
        "autoregression": Case(Trace_ELBO, autoregressive, AutoNormal),
        "network in training": Case(
            Trace_ELBO, Network(), lambda model: AutoNormal(poutine.block(model, expose=["loc"]))
        ),
        "network evaluated": Case(
            Trace_ELBO, evaluated, lambda model: AutoNormal(poutine.block(model, expose=["loc"]))
        ),
        "autoencoder": Case(Trace_ELBO, autoencoder, lambda model: autoencoder.guide),
        "PyroModule": Case(Trace_ELBO, Bayesian(), AutoNormal),
    }


def eager_cases() -> dict[str, tuple[Case, str]]:
    """ELBOs whose steps stay eager, and why."""
    return {
        "EnergyDistance": (Case(lambda: EnergyDistance(num_particles=3), normal, AutoNormal), "no method of"),
        "ReweightedWakeSleep": (Case(lambda: ReweightedWakeSleep(num_particles=2), normal, AutoNormal), ""),
    }

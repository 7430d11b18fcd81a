"""The optimizer under Pyro's inference: equal to pyro.optim with the same noise."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample

import distopt.optim
from tests.optim.trajectories import assert_close

DATA = torch.linspace(-1.0, 2.0, 12)


def normal_model(data):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(loc, scale), obs=data)


def normal_guide(data):
    m = pyro.param("m", torch.tensor(0.1))
    s = pyro.param("s", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("loc", dist.Normal(m, s))
    pyro.sample("scale", dist.LogNormal(pyro.param("n", torch.zeros(())), 0.3))


@config_enumerate
def mixture_model(data):
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=dist.constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-0.5, 1.0]))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[z], 0.5), obs=data)


def empty_guide(data):
    pass


def discrete_guide(data):
    probs = pyro.param("probs", torch.tensor(0.3), constraint=dist.constraints.unit_interval)
    pyro.sample("flip", dist.Bernoulli(probs))


def discrete_model(data):
    flip = pyro.sample("flip", dist.Bernoulli(0.5))
    with pyro.plate("data", len(data)):
        pyro.sample(
            "x",
            dist.Normal(flip, pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)),
            obs=data,
        )


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, data):
        mean = self.linear(data[:, None]).squeeze(-1)
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(mean, self.scale), obs=data)


def regression():
    pyro.set_rng_seed(4)
    model = Regression()
    return model, AutoNormal(model)


CASES = {
    "trace": (lambda: (normal_model, normal_guide), lambda: Trace_ELBO()),
    "mean field": (lambda: (normal_model, normal_guide), lambda: TraceMeanField_ELBO()),
    "particles": (lambda: (normal_model, normal_guide), lambda: Trace_ELBO(num_particles=3)),
    "particles vectorized": (
        lambda: (normal_model, normal_guide),
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    ),
    "renyi": (lambda: (normal_model, normal_guide), lambda: RenyiELBO(alpha=0.5, num_particles=2)),
    "graph": (lambda: (discrete_model, discrete_guide), lambda: TraceGraph_ELBO()),
    "enum": (lambda: (mixture_model, empty_guide), lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "wake sleep": (
        lambda: (normal_model, normal_guide),
        lambda: ReweightedWakeSleep(num_particles=2, vectorize_particles=False),
    ),
    "pyro module": (regression, lambda: Trace_ELBO()),
    "autoguide": (lambda: (normal_model, AutoNormal(normal_model)), lambda: Trace_ELBO()),
}


def train(module, case, steps=8):
    pyro.clear_param_store()
    make, elbo = CASES[case]
    model, guide = make()
    svi = SVI(model, guide, module.ClippedAdam({"lr": 0.05}), elbo())
    pyro.set_rng_seed(7)
    losses = [torch.as_tensor(svi.step(DATA)) for _ in range(steps)]
    values = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    return losses, values


@pytest.mark.parametrize(("case", "local"), [*((case, False) for case in CASES), ("autoguide", True)])
def test_svi_takes_the_steps_that_it_takes_with_pyro_optim(case, local):
    with pyro.settings.context(module_local_params=local):
        losses, values = train(distopt.optim, case)
        expected_losses, expected = train(pyro.optim, case)
    assert_close(values, expected, torch.float32)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)


def test_local_parameters_of_a_module_are_stepped_though_the_store_has_no_name_for_them():
    def values(module):
        with pyro.settings.context(module_local_params=True):
            model, guide = regression()
            guide(DATA)
            params = [*model.parameters(), *guide.parameters()]
            optim = module.Adam({"lr": 0.05})
            for _ in range(4):
                Trace_ELBO().differentiable_loss(model, guide, DATA).backward()
                optim(params)
                for p in params:
                    p.grad = None
            return [p.detach().clone() for p in params]

    assert_close(values(distopt.optim), values(pyro.optim), torch.float32)


def test_parameter_shared_between_modules_is_stepped_once():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    second.weight = first.weight

    def model(data):
        pyro.module("first", first)
        pyro.module("second", second)
        pyro.sample("x", dist.Normal(second(first(torch.ones(2))), 1.0).to_event(1), obs=torch.zeros(2))

    optim = distopt.optim.Adam({"lr": 0.1})
    svi = SVI(model, empty_guide, optim, Trace_ELBO())
    before = first.weight.detach().clone()
    svi.step(DATA)
    torch.testing.assert_close((before - first.weight).abs(), torch.full((2, 2), 0.1), rtol=1e-4, atol=1e-4)
    assert len(optim.get_state()) == 3

"""Small models of the kinds of Pyro's examples: captured steps equal eager ones in every bit."""

import warnings
from functools import partial

import numpy as np
import pyro
import pyro.contrib.epidemiology.compartmental as compartmental
import pyro.contrib.gp as gp
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.cevae import Guide, Model, TraceCausalEffect_ELBO
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.distributions import constraints
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal, AutoNormalizingFlow
from torch import nn

from distopt.examples.flights import Flights
from distopt.infer.capture import StepCapture
from tests.infer.capture.steps import EagerSteps, assert_same, run_steps


class StateSpace(nn.Module):
    """A deep Markov model: an RNN in the guide, annealing, sequences of unequal length."""

    def __init__(self):
        super().__init__()
        self.emission = nn.Linear(2, 3)
        self.transition = nn.Linear(2, 4)
        self.rnn = nn.RNN(3, 4, batch_first=True)
        self.combiner = nn.Linear(6, 4)
        self.first = nn.Parameter(torch.zeros(2))

    def step(self, t, parameters, mask, annealing):
        loc, log_scale = parameters.chunk(2, -1)
        with poutine.scale(scale=annealing):
            return pyro.sample(f"z{t}", dist.Normal(loc, log_scale.exp()).mask(mask[:, t : t + 1]).to_event(1))

    def model(self, x, mask, annealing):
        pyro.module("state_space", self)
        with pyro.plate("sequences", len(x)):
            z = self.first.expand(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                z = self.step(t, self.transition(z), mask, annealing)
                observed = dist.Bernoulli(logits=self.emission(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x{t}", observed, obs=x[:, t])

    def guide(self, x, mask, annealing):
        pyro.module("state_space", self)
        hidden, _ = self.rnn(x)
        with pyro.plate("sequences", len(x)):
            z = self.first.expand(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                z = self.step(t, self.combiner(torch.cat([z, hidden[:, t]], -1)), mask, annealing)


def deep_markov():
    space = StateSpace()
    x = (torch.randn(5, 4, 3) > 0).float()
    mask = torch.ones(5, 4)
    mask[2:, 3] = 0
    return Trace_ELBO(), space.model, space.guide, lambda i: (x, mask, 0.1 if i < 3 else 1.0)


class SemiSupervised(nn.Module):
    """An autoencoder with labels in every second batch, enumerated where they are missing."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(5, 6)
        self.labels = nn.Linear(6, 3)
        self.encoder = nn.Linear(9, 4)

    def model(self, x, y=None):
        pyro.module("semi_supervised", self)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3) / 3), obs=y)
            shape = torch.broadcast_shapes(y.shape[:-1], z.shape[:-1])
            logits = self.decoder(torch.cat([z.expand(*shape, 2), y.expand(*shape, 3)], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=(x > 0).float())

    def guide(self, x, y=None):
        with pyro.plate("rows", len(x)):
            if y is None:
                labels = dist.OneHotCategorical(logits=self.labels(x))
                y = pyro.sample("y", labels, infer={"enumerate": "parallel"})
            shape = torch.broadcast_shapes(y.shape[:-1], x.shape[:-1])
            encoded = self.encoder(torch.cat([x.expand(*shape, 6), y.expand(*shape, 3)], -1))
            loc, log_scale = encoded.chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def semi_supervised():
    network = SemiSupervised()
    x = torch.randn(10, 6)
    y = torch.eye(3)[torch.arange(10) % 3]
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    return elbo, network.model, network.guide, lambda i: (x,) if i % 2 else (x, y)


class AttendInferRepeat(nn.Module):
    """Objects that may be absent, with a network as the baseline of their score function."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(3, 16)
        self.rnn = nn.LSTMCell(16, 7)
        self.baseline = nn.Linear(16, 1)

    def model(self, x):
        pyro.module("air", self)
        with pyro.plate("rows", len(x)):
            present = torch.ones(len(x))
            image = torch.zeros(len(x), 16)
            for t in range(2):
                present = pyro.sample(f"present{t}", dist.Bernoulli(0.5 * present))
                what = dist.Normal(torch.zeros(len(x), 3), 1.0).mask(present[:, None]).to_event(1)
                image = image + self.decoder(pyro.sample(f"what{t}", what)) * present[:, None]
            pyro.sample("x", dist.Normal(image, 0.3).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("air", self)
        with pyro.plate("rows", len(x)):
            present = torch.ones(len(x))
            state = (torch.zeros(len(x), 7), torch.zeros(len(x), 7))
            for t in range(2):
                state = self.rnn(x, state)
                hidden = state[0]
                infer = {"baseline": {"baseline_value": self.baseline(x)[:, 0]}}
                chance = torch.sigmoid(hidden[:, 0]) * present
                present = pyro.sample(f"present{t}", dist.Bernoulli(chance), infer=infer)
                what = dist.Normal(hidden[:, 1:4], hidden[:, 4:7].exp()).mask(present[:, None]).to_event(1)
                pyro.sample(f"what{t}", what)


def attend_infer_repeat():
    network = AttendInferRepeat()
    x = torch.randn(6, 16)
    return TraceGraph_ELBO(), network.model, network.guide, lambda i: (x,)


def topics():
    """Latent Dirichlet allocation with a network in the guide."""
    documents = torch.randint(0, 7, (6, 4))
    predictor = nn.Sequential(nn.Linear(7, 3), nn.Softmax(-1))

    def model(tokens):
        with pyro.plate("topics", 3):
            weights = pyro.sample("weights", dist.Gamma(1.0 / 3, 1.0))
            vocabulary = pyro.sample("vocabulary", dist.Dirichlet(torch.ones(7) / 7))
        with pyro.plate("documents", 4):
            mix = pyro.sample("mix", dist.Dirichlet(weights))
            with pyro.plate("words", 6):
                topic = pyro.sample("topic", dist.Categorical(mix), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(vocabulary[topic]), obs=tokens)

    def guide(tokens):
        pyro.module("predictor", predictor)
        shape = pyro.param("shape", lambda: torch.ones(3), constraint=constraints.positive)
        prior = pyro.param("prior", lambda: 1.5 * torch.ones(3, 7), constraint=constraints.greater_than(0.5))
        with pyro.plate("topics", 3):
            pyro.sample("weights", dist.Gamma(shape, 1.0))
            pyro.sample("vocabulary", dist.Dirichlet(prior))
        with pyro.plate("documents", 4):
            counts = torch.zeros(7, 4).scatter_add(0, tokens, torch.ones(tokens.shape))
            pyro.sample("mix", dist.Delta(predictor(counts.t()), event_dim=1))

    return TraceEnum_ELBO(max_plate_nesting=2), model, guide, lambda i: (documents,)


def music():
    """A hidden Markov model of sequences with known, unequal lengths."""
    notes = torch.randint(0, 2, (3, 4, 5)).float()
    lengths = torch.tensor([4, 2, 3])

    def model():
        transitions = pyro.sample("transitions", dist.Dirichlet(0.9 * torch.eye(2) + 0.1).to_event(1))
        chances = pyro.sample("chances", dist.Beta(0.1, 0.9).expand([2, 5]).to_event(2))
        tones = pyro.plate("tones", 5, dim=-1)
        with pyro.plate("sequences", 3, dim=-2):
            x = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    states = dist.Categorical(transitions[x])
                    x = pyro.sample(f"x{t}", states, infer={"enumerate": "parallel"})
                    with tones:
                        pyro.sample(f"y{t}", dist.Bernoulli(chances[x.squeeze(-1)]), obs=notes[:, t])

    guide = AutoDelta(poutine.block(model, expose=["transitions", "chances"]))
    return TraceEnum_ELBO(max_plate_nesting=2), model, guide, lambda i: ()


def mixed_effects():
    """A hidden Markov model of individuals in groups."""
    steps = torch.randn(4, 5).exp()

    def model(y):
        groups = pyro.sample("groups", dist.Dirichlet(torch.ones(2)))
        effects = pyro.sample("effects", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        shapes = pyro.sample("shapes", dist.LogNormal(0.0, 0.5).expand([2]).to_event(1))
        with pyro.plate("individuals", 4):
            group = pyro.sample("group", dist.Categorical(groups), infer={"enumerate": "parallel"})
            x = torch.tensor(0)
            for t in pyro.markov(range(5)):
                logits = effects[x, :] + 0.1 * group.unsqueeze(-1)
                x = pyro.sample(f"x{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                pyro.sample(f"y{t}", dist.Gamma(shapes[x], 1.0), obs=y[:, t])

    guide = AutoNormal(poutine.block(model, expose=["groups", "effects", "shapes"]))
    return TraceEnum_ELBO(max_plate_nesting=1), model, guide, lambda i: (steps,)


def gaussian_process():
    x = torch.linspace(0, 5, 12)
    kernel = gp.kernels.Matern32(1)
    process = gp.models.VariationalSparseGP(x, (x.sin() > 0).float(), kernel, x[::3].clone(), gp.likelihoods.Binary())
    return TraceMeanField_ELBO(), process.model, process.guide, lambda i: ()


class BayesianNetwork(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = pyro.nn.PyroModule[nn.Linear](2, 4)
        self.layer.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([4, 2]).to_event(2))
        self.layer.bias = pyro.nn.PyroSample(lambda module: dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        self.out = pyro.nn.PyroModule[nn.Linear](4, 1)

    def forward(self, x, y=None):
        scale = pyro.sample("scale", dist.Uniform(0.0, 10.0))
        mean = self.out(torch.tanh(self.layer(x)))[:, 0]
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, scale), obs=y)


def bayesian_network():
    network = BayesianNetwork()
    x = torch.randn(12, 2)
    return Trace_ELBO(num_particles=2), network, AutoDiagonalNormal(network), lambda i: (x, x.sum(1))


def normalizing_flow():
    x = torch.randn(10, 3)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1)).view(2, 2)
        with pyro.plate("rows", len(x)):
            factor = torch.cat([z, z[:1]])
            pyro.sample("x", dist.LowRankMultivariateNormal(torch.zeros(3), factor, torch.ones(3)), obs=x)

    guide = AutoNormalizingFlow(model, partial(iterated, 2, affine_autoregressive))
    return Trace_ELBO(), model, guide, lambda i: (x,)


def epidemic():
    """The step that `fit_svi` of a compartmental model takes."""
    made = {}

    class Stop(Exception):
        pass

    class Recording:
        def __init__(self, model, guide, optim, loss):
            made.update(model=model, guide=guide, elbo=loss)

        def step(self):
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compartmental, "SVI", Recording)
        with pytest.raises(Stop):
            SimpleSIRModel(100, 5.0, torch.tensor([1.0, 2, 3, 5, 4, 3])).fit_svi(num_steps=1, num_samples=1)
    return made["elbo"], made["model"], made["guide"], lambda i: ()


def causal_effect():
    """Networks of model and guide have the same names here, so that the store has those of one of them alone."""
    config = {"feature_dim": 3, "latent_dim": 2, "hidden_dim": 4, "num_layers": 2, "num_samples": 2}
    model = Model(config | {"outcome_dist": "bernoulli"})
    guide = Guide(config | {"outcome_dist": "bernoulli"})
    x = torch.randn(10, 3)
    treated = (torch.randn(10) > 0).float()
    return TraceCausalEffect_ELBO(), model, guide, lambda i: (x, treated, 1 - treated, 10)


QUICK = [semi_supervised, topics, gaussian_process, bayesian_network, normalizing_flow]
MANY_STEPS = [deep_markov, attend_infer_repeat, music, mixed_effects, epidemic]


def captured_steps(make):
    """Compares 20 steps, and returns what captured them."""
    results = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            elbo, model, guide, args = make()
        pyro.clear_param_store()
        step = kind(elbo.loss_and_grads)
        results.append(run_steps(step, model, guide, args))
    assert_same(*results)
    return step


def check(make):
    step = captured_steps(make)
    assert step.refusal is None
    assert step.num_captured >= 13


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")  # of batches with labels
@pytest.mark.parametrize("make", QUICK, ids=lambda make: make.__name__)
def test_example_is_captured(make):
    check(make)


@pytest.mark.slow
@pytest.mark.parametrize("make", MANY_STEPS, ids=lambda make: make.__name__)
def test_example_of_many_operations_is_captured(make):
    check(make)


def test_flights_are_captured():
    """A task holds the numbers of its rows in an array that is too large to compare, and asks for its length."""
    task = Flights()
    pyro.clear_param_store()
    step = StepCapture(Trace_ELBO().loss_and_grads)
    batch = task.batch(np.arange(300))
    for _ in range(5):
        step(task.model, task.guide, *batch)
    assert (step.refusal, step.num_captured) == (None, 2)


def test_example_whose_networks_share_names_is_eager():
    assert "no parameter of the store" in captured_steps(causal_effect).refusal

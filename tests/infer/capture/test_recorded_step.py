"""A step that is recorded computes what Pyro's does, and says what cannot be repeated."""

from __future__ import annotations

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture.recorded_step import record_step
from distopt.infer.capture.recording import Slot
from tests.infer.capture.cases import DATA, hierarchy, normal


@pytest.fixture
def guide():
    made = AutoNormal(hierarchy)
    Trace_ELBO().loss_and_grads(hierarchy, made, DATA)
    clear_grads()
    return made


def clear_grads():
    for param in pyro.get_param_store()._params.values():
        param.grad = None


def grads():
    return {
        name: param.grad.clone() for name, param in pyro.get_param_store()._params.items() if param.grad is not None
    }


def test_loss_gradients_and_generator_are_those_of_the_step_itself(guide):
    torch.manual_seed(3)
    loss = Trace_ELBO().loss_and_grads(hierarchy, guide, DATA)
    expected, state = grads(), torch.get_rng_state()
    clear_grads()
    torch.manual_seed(3)
    step = record_step(Trace_ELBO().loss_and_grads, hierarchy, guide, (DATA,), {})
    assert step.losses == [loss] and torch.equal(torch.get_rng_state(), state)
    actual = grads()
    assert actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def test_recording_knows_parameters_gradients_and_loss_by_their_slots(guide):
    step = record_step(Trace_ELBO().loss_and_grads, hierarchy, guide, (DATA,), {})
    recording, store = step.recording, list(pyro.get_param_store()._params.values())
    assert recording.refusal is None and step.params == store
    assert {id(param) for param in step.used} == {id(store[index]) for index in recording.used_params}
    assert len(recording.grads) == recording.num_params == len(store) and min(recording.grads) >= 0
    assert [type(loss) for loss in recording.losses] == [Slot] and recording.loss_type is None


def test_losses_of_an_objective_of_several_numbers_keep_their_type():
    def latent(x):
        z = pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def proposal(x):
        pyro.sample("z", dist.Normal(pyro.param("b", torch.tensor(0.1)), 1.0))

    objective = ReweightedWakeSleep(num_particles=2).loss_and_grads
    objective(latent, proposal, torch.tensor(1.0))
    step = record_step(objective, latent, proposal, (torch.tensor(1.0),), {})
    assert step.recording.loss_type is tuple and len(step.losses) == len(step.recording.losses) == 2


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_numbers_of_other_generators_are_refused(draw):
    def model(x):
        pyro.param("a", torch.tensor(1.0))
        draw()
        normal(x)

    made = AutoNormal(model)
    Trace_ELBO().loss_and_grads(model, made, DATA)
    step = record_step(Trace_ELBO().loss_and_grads, model, made, (DATA,), {})
    assert step.recording.refusal.startswith("random numbers of Python's random or of NumPy are drawn")


def test_error_of_the_model_leaves_generators_gradients_and_tensors_as_they_were(guide):
    Trace_ELBO().loss_and_grads(hierarchy, guide, DATA)
    counter = torch.zeros(())
    before = grads(), torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)[1].tolist()

    def failing(x):
        hierarchy(x)
        counter.add_(1)
        torch.rand(3), random.random(), np.random.rand()
        raise ArithmeticError("rotten")

    with pytest.raises(ArithmeticError, match="rotten"):
        record_step(Trace_ELBO().loss_and_grads, failing, guide, (DATA,), {})
    assert counter == 0 and torch.equal(torch.get_rng_state(), before[1]) and random.getstate() == before[2]
    assert np.random.get_state(legacy=True)[1].tolist() == before[3]
    after = grads()
    assert after.keys() == before[0].keys() and all(torch.equal(after[name], before[0][name]) for name in after)

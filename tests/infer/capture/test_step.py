import gc

import psutil
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture
from distopt.infer.capture.step import MAX_PROGRAMS
from tests.infer.capture.cases import DATA, Case, Network, captured_cases, hierarchy
from tests.infer.capture.steps import compare, run_steps

CASES = captured_cases()


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_equal_eager_ones_in_every_bit(name):
    capture = compare(CASES[name])
    assert capture.refusal is None
    assert capture.num_captured >= 14 or (capture.num_captured >= 5 and "score" in name)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", CASES)
def test_captured_steps_add_to_gradients_that_are_there(name):
    capture = compare(CASES[name], 9, keep_grads=True)
    assert capture.refusal is None


def annealed(x, factor):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.poutine.scale(scale=factor), pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_arguments_that_differ_in_each_step_are_recorded_a_few_times_only():
    pyro.clear_param_store()
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(annealed)
    run_steps(capture, annealed, guide, lambda i: (DATA, 0.1 + i / 100), 17)
    assert "keep changing; steps are recorded again after 8 eager ones" in capture.refusal
    assert capture.num_recorded <= MAX_PROGRAMS
    assert capture._variants == {}
    run_steps(capture, annealed, guide, lambda i: (DATA, 1.0), 10)
    assert capture.refusal is None
    assert capture.num_captured > 0


NUMBERS = {
    "annealed": (lambda i: min(1.0, 0.1 + i / 15), 40, 10),
    "of two kinds of steps": (lambda i: (1.0, 0.5)[i % 2], 14, 8),
    "of three kinds of steps": (lambda i: (1.0, 0.5, 0.2)[i % 3], 16, 7),
    "once another": (lambda i: 0.5 if i == 7 else 1.0, 14, 9),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_number_that_changes_between_steps_is_captured_where_it_comes_again(name):
    number, num_steps, num_captured = NUMBERS[name]
    scale = [1.0]

    def model(x):
        annealed(x, scale[0])

    def change(i):
        scale[0] = number(i)

    capture = compare(Case(Trace_ELBO, model, AutoNormal, (DATA,), change), num_steps)
    assert capture.refusal is None
    assert capture.num_captured >= num_captured


@pytest.mark.parametrize("period", [2, 3])
def test_number_that_the_step_itself_changes_is_never_captured(period):
    state = {"step": 0}

    def model(x):
        state["step"] = (state["step"] + 1) % period
        annealed(x, (1.0, 0.5, 0.2)[state["step"]])

    capture = compare(Case(Trace_ELBO, model, AutoNormal, (DATA,), lambda i: i or state.update(step=0)), 24)
    assert capture.num_captured == 0
    assert "state['step'] changes from step to step" in capture.refusal


def test_number_that_comes_again_when_the_step_has_changed_it_is_never_captured():
    state = {"step": 0}

    def model(x):
        state["step"] += 1
        annealed(x, 1.0 / state["step"])

    def change(i):
        state["step"] = (0, 1)[i % 2]

    assert compare(Case(Trace_ELBO, model, AutoNormal, (DATA,), change), 24).num_captured == 0


def branching(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    factor = 2.0 if loc > 0 else 1.0
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc * factor, 10.0), obs=x)


def growth(model, guide, args, num_steps):
    """Returns by how many objects and bytes the second half of some steps lets the process grow."""
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    measured = []
    for _ in range(2):
        run_steps(capture, model, guide, args, num_steps // 2)
        gc.collect()
        measured.append((len(gc.get_objects()), psutil.Process().memory_info().rss))
    assert capture.num_captured > num_steps // 2
    return measured[1][0] - measured[0][0], measured[1][1] - measured[0][1]


GROWTH_CASES = {
    "plain": (hierarchy, AutoNormal, (DATA,)),
    "network": (Network(), lambda model: AutoNormal(pyro.poutine.block(model, expose=["loc"])), (DATA,)),
    "branches": (branching, AutoNormal, (DATA,)),
    "three lengths": (hierarchy, AutoNormal, lambda i: (DATA[: 40 + i % 3],)),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", GROWTH_CASES)
def test_captured_steps_leave_no_objects_behind(name):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, args = GROWTH_CASES[name]
    assert growth(model, guide(model), args, 300)[0] <= 1000  # what run_steps and Python's caches keep


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", GROWTH_CASES)
def test_ten_thousand_captured_steps_need_no_more_memory_than_half_of_them(name):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, args = GROWTH_CASES[name]
    num_objects, num_bytes = growth(model, guide(model), args, 10_000)
    assert num_objects <= 1000
    assert num_bytes <= 16 << 20


def test_steps_under_a_default_device_are_captured_and_no_program_serves_another_default():
    pyro.clear_param_store()
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(annealed)
    try:
        torch.set_default_device("cpu")
        run_steps(capture, annealed, guide, lambda i: (DATA, 0.5), 6)
    finally:
        torch.set_default_device(None)
    assert (capture.num_recorded, capture.num_captured, capture.refusal) == (2, 3, None)
    run_steps(capture, annealed, guide, lambda i: (DATA, 0.5), 1)
    assert (capture.num_recorded, capture.num_captured) == (3, 3)


def test_steps_under_hooks_of_saved_tensors_are_eager():
    pyro.clear_param_store()
    capture = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(annealed)
    calls = []

    def pack(tensor):
        calls.append(tensor)
        return tensor

    run_steps(capture, annealed, guide, lambda i: (DATA, 0.5), 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_steps(capture, annealed, guide, lambda i: (DATA, 0.5), 1)
    assert capture.num_captured == 2
    assert calls

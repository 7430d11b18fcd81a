"""Programs: the loop in Python computes what the loop in C++ does, and neither leaves traces of a step that fails."""

import gc
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture, program
from distopt.infer.capture.recorder import Recorder
from tests.infer.capture.cases import DATA, captured_cases, normal
from tests.infer.capture.steps import EagerSteps, assert_same, compare, run_steps

CASES = captured_cases()


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", CASES)
def test_loop_in_python_equals_eager_steps(monkeypatch, name):
    monkeypatch.setattr(program, "compiled", None)
    capture = compare(CASES[name], 7, keep_grads="Enum" in name)
    assert capture.refusal is None
    assert capture.num_captured >= 2


@pytest.mark.skipif(
    program.compiled is None,
    reason="the extension is not built (needs a C++ compiler; `python setup.py build_ext --inplace`)",
)
@pytest.mark.parametrize("name", ["hierarchy", "LKJ", "autoencoder"])
def test_atens_arithmetic_and_direct_arithmetic_agree(name):
    compare(CASES[name], 7, direct=False)


def test_extension_of_another_torch_is_not_used(monkeypatch):
    if program.compiled is None:
        pytest.skip("the extension is not built (needs a C++ compiler; `python setup.py build_ext --inplace`)")
    monkeypatch.setattr(program.compiled, "TORCH", "0.0")
    assert program._load() is None


@pytest.mark.parametrize("in_cpp", [True, False])
def test_failed_check_leaves_buffers_and_gradients_as_they_were(monkeypatch, in_cpp):
    if not in_cpp:
        monkeypatch.setattr(program, "compiled", None)
    elif program.compiled is None:
        pytest.skip("the extension is not built (needs a C++ compiler; `python setup.py build_ext --inplace`)")
    norm = torch.nn.BatchNorm1d(1)

    def model(x):
        pyro.module("norm", norm)
        scale = 1.0 if x.sum() > 0 else 2.0
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(norm(x[:, None])[:, 0], scale), obs=x)

    def guide(x):
        pass

    step = StepCapture(Trace_ELBO().loss_and_grads)
    positive = DATA.abs()
    run_steps(step, model, guide, (positive,), 6)
    assert step.num_captured == 3
    before = [buffer.clone() for buffer in norm.buffers()]
    step(model, guide, -positive)  # the other branch: an eager step, which moves the buffers once
    assert int(norm.num_batches_tracked) == int(before[-1]) + 1
    assert step.num_captured == 3


def frozen_weight_that_is_trained_later():
    weight = torch.ones(2)

    def change(i):
        weight.requires_grad_(i in (6, 7))

    return lambda x: (weight * x).exp().sum(), lambda i: torch.ones(2), change, lambda: str(weight.grad)


def argument_in_memory_that_is_written():
    total = torch.ones(4)
    other = torch.full((4,), 3.0)

    def read(x):
        before = (x * 2.0).sum()
        with torch.no_grad():
            total.mul_(0.9)
        return 1.0 + before - (x * 2.0).sum()

    return read, lambda i: other if i < 6 else total, lambda i: None, total.tolist


def conjugate():
    x = torch.tensor([1 + 2j, 3 - 1j])
    return lambda x: x.abs().sum() + (x * x).imag.exp().sum(), lambda i: x if i < 6 else x.conj(), lambda i: None, str


def negative():
    x = torch.tensor([1 + 2j, 3 - 1j])
    return lambda x: x.exp().sum(), lambda i: x.imag if i < 6 else x.conj().imag, lambda i: None, str


def negative_inside():
    x = torch.tensor([1 + 2j, 3 - 1j])
    return lambda x: x.conj().imag.exp().sum(), lambda i: x, lambda i: None, str


def negative_zero():
    return lambda x: 1.5 + math.copysign(0.5, x), lambda i: 0.0 if i < 6 else -0.0, lambda i: None, str


INPUTS = [
    *(frozen_weight_that_is_trained_later, argument_in_memory_that_is_written, conjugate, negative),
    *(negative_inside, negative_zero),
]


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_program_does_not_run_for_inputs_that_it_was_not_built_for(monkeypatch, make, in_cpp):
    if not in_cpp:
        monkeypatch.setattr(program, "compiled", None)
    elif program.compiled is None:
        pytest.skip("the extension is not built (needs a C++ compiler; `python setup.py build_ext --inplace`)")
    results = []
    left = []
    for kind in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        read, argument, change, observe = make()

        def model(x, read=read):
            loc = pyro.sample("loc", dist.Normal(0.0, read(x)))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(()))

        step = kind(Trace_ELBO().loss_and_grads)
        args = [(argument(i),) for i in range(14)]
        results.append(run_steps(step, model, AutoNormal(model), args.__getitem__, 14, before_step=change))
        left.append(observe())
    assert_same(*results)
    assert left[0] == left[1]
    assert step.num_captured >= 3 or make is negative_inside


def test_gradients_that_somebody_keeps_are_not_overwritten():
    step = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(normal)
    run_steps(step, normal, guide, (DATA,), 5)
    step(normal, guide, DATA)
    params = list(pyro.get_param_store()._params.values())
    kept = [param.grad for param in params]
    values = [grad.clone() for grad in kept]
    for _ in range(3):
        for param in params:
            param.grad = None
        step(normal, guide, DATA)
    assert all(torch.equal(a, b) for a, b in zip(kept, values, strict=True))
    assert step.num_captured >= 4


def test_program_that_runs_already_is_not_entered_again():
    built = []
    results = []

    def enter():
        results.extend(each.run({}, []) for each in built)

    recorder = Recorder()
    recorder.start()
    with recorder:
        recorder.host("enter", enter)
    recorder.close()
    built.append(program.build(recorder.recording, [], []))
    assert built[0].run({}, [])[0] == program.RAN
    assert results == [(program.BUSY, [])]


@pytest.mark.slow
def test_ten_thousand_steps_need_no_more_memory():
    psutil = pytest.importorskip("psutil", reason="psutil is not installed (make setup-dev)")
    step = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(normal)
    run_steps(step, normal, guide, (DATA,), 1500)
    gc.collect()
    before = psutil.Process().memory_info().rss
    run_steps(step, normal, guide, (DATA,), 10_000)
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 8 << 20
    assert step._num_programs == 1

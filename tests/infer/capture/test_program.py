"""Programs: the loop in Python computes what the loop in C++ does, and neither leaves traces of a step that fails."""

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture, program
from distopt.infer.capture.recorder import Recorder
from tests.infer.capture.cases import DATA, captured_cases, normal
from tests.infer.capture.steps import compare, run_steps

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

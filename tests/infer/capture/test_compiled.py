"""Compiled steps: as exact as eager ones, the same bits from every process, and captured ones where they cannot be."""

import copy
import json
import logging
import math
import os
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from distopt.infer import SVI, TensorRows, seed_all
from distopt.infer.capture import compiled
from distopt.infer.capture import program as programs
from distopt.infer.capture.compiled import NotCompiledError, fuse
from distopt.infer.capture.passes import shorten
from distopt.infer.capture.program import _call
from distopt.infer.capture.recorded_step import RecordedStep, record_step
from distopt.infer.capture.recording import Op, Recording, TensorInfo
from distopt.optim import DistributedOptimizer
from tests.infer.capture.cases import DATA, captured_cases
from tests.workers import world

CASES = captured_cases()


def small(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def train(num_steps: int, *, first: int = 0, params=None, capture="compiled", model=small, compile_from=None):
    """Takes steps with gradients that are stepped by themselves; returns losses, parameters and the capture."""
    pyro.clear_param_store()
    guide = AutoNormal(model)
    guide(DATA)
    optim = DistributedOptimizer(pyro.optim.SGD({"lr": 1e-3}))
    svi = SVI(model, guide, optim, Trace_ELBO(), capture=capture, compile_from_step=compile_from)
    for name, value in (params or {}).items():
        pyro.param(name).unconstrained().data.copy_(value)
    losses = []
    for step in range(first, first + num_steps):
        seed_all(3, step)
        losses.append(svi.step_with((DATA,), step=step).loss)
    store = {name: param.detach().clone() for name, param in pyro.get_param_store()._params.items()}
    return losses, store, svi.captured


def recorded(case) -> tuple[RecordedStep, tuple[Tensor, ...]]:
    """Returns a recorded step of a case, after an eager one, and its arguments."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    loss_and_grads = case.elbo().loss_and_grads
    guide = case.guide(case.model)
    args = case.args(0) if callable(case.args) else case.args
    loss_and_grads(case.model, guide, *args)
    for param in pyro.get_param_store()._params.values():
        param.grad = None
    return record_step(loss_and_grads, case.model, guide, args, {}), args


# One compilation for all of these: lists that are met again in a process are not compiled again.


@pytest.mark.timeout(900)  # a compiler on a busy machine
def test_compiled_steps_are_taken_from_the_first_one_and_agree_with_eager_ones():
    losses, params, capture = train(20)
    assert (capture.refusal, capture.notice) == (None, None)
    assert capture.num_captured == 20
    assert len(set(capture.keys)) == 1
    expected_losses, expected, _ = train(20, capture="off")
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(900)
def test_first_step_selects_its_rows_itself_as_later_ones_do():
    results = []
    for rows_of in (lambda rows: (DATA[rows],), lambda rows: TensorRows((DATA,), rows)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim = DistributedOptimizer(pyro.optim.SGD({"lr": 1e-3}))
        svi = SVI(small, AutoNormal(small), optim, Trace_ELBO(), capture="compiled")
        results.append(svi.step_with(rows_of(torch.arange(20))).loss)  # which makes the parameters
    assert results[0] == results[1]


def test_run_that_resumes_has_the_bits_of_one_that_was_never_stopped():
    through_losses, through, _ = train(12)
    for first in (3, 8):  # the eighth step is recorded again for comparison
        begun, params, _ = train(first)
        ended, resumed, _ = train(12 - first, first=first, params=params)
        assert begun + ended[1:] == through_losses[:first] + through_losses[first + 1 :]
        assert ended[0] == pytest.approx(through_losses[first])  # the loss of a first step crosses in 32 bits
        assert all(torch.equal(resumed[name], through[name]) for name in through)


@pytest.mark.parametrize("first", [3, 7])
def test_run_that_compiles_from_a_step_on_does_so_after_a_resume_too(first):
    through_losses, through, capture = train(12, capture="auto", compile_from=6)
    assert capture.num_captured == 7  # steps 6 to 12
    eager_losses, _, _ = train(12, capture="off")
    assert through_losses[:5] == eager_losses[:5]
    begun, params, _ = train(first, capture="auto", compile_from=6)
    ended, resumed, _ = train(12 - first, first=first, params=params, capture="auto", compile_from=6)
    assert begun + ended[1:] == through_losses[:first] + through_losses[first + 1 :]
    assert all(torch.equal(resumed[name], through[name]) for name in through)


@pytest.mark.parametrize(("capture", "step"), [("graph", 6), ("off", 6), ("compiled", 6), ("auto", 0)])
def test_step_to_compile_from_is_one_of_auto(capture, step):
    with pytest.raises(ValueError, match=f"compile_from_step={step} .* must be 1 or more, with capture='auto'"):
        train(1, capture=capture, compile_from=step)


def test_rehearsals_leave_generators_gradients_and_tensors_as_they_were():
    touched = torch.zeros(3)

    def model(x):
        touched.add_(1.0)
        return small(x)

    _, _, capture = train(10, model=model)
    assert "writes to a tensor that existed before it" in capture.notice
    assert touched.tolist() == [10.0 + 1.0] * 3  # ten steps, and the guide's setup


@pytest.mark.parametrize("bad_step", [1, 7])
@pytest.mark.parametrize("registered", [False, True])
def test_buffers_are_those_of_eager_steps_where_the_first_step_makes_parameters_or_a_loss_is_not_finite(
    registered, bad_step
):
    def run(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))

        def model(x, term):
            module = pyro.module("net", net)
            pyro.sample("y", dist.Normal(module(x).squeeze(-1), 1.0).to_event(1), obs=x.squeeze(-1))
            pyro.factor("term", term)

        if registered:
            pyro.module("net", net)
        svi = SVI(model, lambda *args: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), capture=capture)
        x = torch.linspace(-1, 1, 10)[:, None]
        with pyro.validation_enabled(False):
            for step in range(10):
                svi.step(x + step, torch.tensor(math.inf if step == bad_step else 0.0))
        return {name: buffer.tolist() for name, buffer in net.named_buffers()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pyro about the loss
        assert run("compiled") == run("off")


def test_without_a_lock_each_process_compiles_by_itself(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with compiled._lock("key"):
        (lock,) = tmp_path.glob("distopt-*.lock")
    monkeypatch.setattr(compiled.fcntl, "flock", refuse)  # as where a file system has none, or the file is another's
    entered = []
    with compiled._lock("key"):
        entered.append(lock)
    assert entered


def test_list_that_cannot_be_compiled_runs_captured_with_eager_bits():
    def branching(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc if loc > -100.0 else -loc, 1.0), obs=x)

    losses, params, capture = train(12, model=branching)
    assert "a branch is taken on the values of a tensor, at " in capture.notice
    assert capture.num_captured == 12
    eager_losses, eager, _ = train(12, model=branching, capture="off")
    assert losses == eager_losses
    assert all(torch.equal(params[name], eager[name]) for name in eager)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gamma guide", "a random number is drawn that depends on computed values"),
        ("TraceEnum, mixture", "a branch is taken"),
        ("network in training", "writes to a tensor that existed before it"),
    ],
)
def test_list_that_would_not_repeat_its_bits_is_not_compiled(name, reason):
    step, _ = recorded(CASES[name])
    with pytest.raises(NotCompiledError, match=reason):
        fuse(shorten(step.recording), step.params)


def test_compiler_that_fails_or_computes_something_else_leaves_captured_steps(monkeypatch):
    eager_losses, eager, _ = train(6, capture="off")
    monkeypatch.setattr(compiled, "_functions", {})

    def missing(*_args):
        raise RuntimeError("No working C++ compiler found\nin many lines")

    def wrong(graph, _examples):
        return lambda *inputs: tuple(1.001 * each for each in graph(*inputs))

    def rounded(graph, _examples):
        return lambda *inputs: tuple((1 + 1e-7) * each for each in graph(*inputs))

    for function, notice in (
        (missing, "torch's compiler failed: RuntimeError: No working C++ compiler found"),
        (wrong, "a compiled step is not the recorded one"),
    ):
        monkeypatch.setattr(compiled, "_run_compiler", function)
        losses, params, capture = train(6)
        assert capture.notice == notice
        assert capture.num_captured == 6
        assert losses == eager_losses
        assert all(torch.equal(params[name], eager[name]) for name in eager)

    monkeypatch.setattr(compiled, "_functions", {})
    monkeypatch.setattr(compiled, "_run_compiler", rounded)
    assert train(6)[2].notice is None


def test_what_may_differ_follows_from_dtype_and_number_of_terms():
    def tolerance(*tensors):
        recording = Recording()
        recording.infos = [TensorInfo.of(tensor) for tensor in tensors]
        return compiled.Tolerance.of(recording)

    counts = torch.zeros(10**6, dtype=torch.int64)
    eps = torch.finfo(torch.float32).eps
    assert tolerance(torch.zeros(100), torch.zeros(())) == pytest.approx((160 * eps, 1600 * eps))
    assert tolerance(torch.zeros(2, dtype=torch.float64), torch.zeros(())).relative == pytest.approx(16 * eps * 2**0.5)
    assert tolerance(torch.zeros(2, dtype=torch.float64), counts).relative < 1e-11
    flights = tolerance(torch.zeros(8192))
    assert 2e-6 < flights.relative < 1e-3, "a hundredth is an error, and what the compiler was seen to round is none"


def test_graph_of_a_gpu_in_place_of_a_compiled_step_is_said_once(monkeypatch, caplog):
    for module in ("step", "compiled"):
        monkeypatch.setattr(f"distopt.infer.capture.{module}.uses_gpu", lambda recording: True)
    monkeypatch.setattr("distopt.infer.capture.step.build_graph", programs.build)
    with caplog.at_level(logging.INFO, "distopt"):
        _, _, capture = train(6)
    assert capture.num_captured == 6
    assert capture.notice == "the step runs on a GPU, as one CUDA graph"
    messages = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert messages == [f"steps are captured, but not compiled: {capture.notice}"]


# The graph itself needs no compiler: each of its operations run as it stands gives the bits of the recorded step.


@pytest.mark.parametrize("name", CASES)
def test_graph_that_is_compiled_has_the_bits_of_the_recording(name, monkeypatch):
    monkeypatch.setattr(compiled, "_functions", {})
    monkeypatch.setattr(compiled, "_run_compiler", lambda graph, _examples: torch.no_grad()(graph))
    step, args = recorded(CASES[name])
    try:
        fused = fuse(shorten(step.recording), step.params)
    except NotCompiledError:
        return
    tensors = list(dict.fromkeys(arg for arg in args if isinstance(arg, Tensor)))
    store = pyro.get_param_store()._params
    results = []
    for recording in (shorten(step.recording), fused.recording):
        for param in store.values():
            param.grad = None
        torch.manual_seed(1)
        program = programs.build(recording, step.params, tensors)
        status, losses = program.run(store, tensors)
        assert status == programs.RAN
        grads = {name: param.grad.clone() for name, param in store.items() if param.grad is not None}
        results.append((losses, grads, torch.get_rng_state()))
    assert results[0][0] == results[1][0]
    assert list(results[0][1]) == list(results[1][1])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name])
        assert grad.stride() == results[1][1][name].stride()
    assert torch.equal(results[0][2], results[1][2])


def gradients_in_double(step: RecordedStep, args) -> dict[int, Tensor]:
    """Returns the gradient of each parameter, computed in 64 bits from the random numbers of a step in 32."""
    recording = shorten(step.recording)
    draws, body = compiled._split(recording)
    inputs = [*step.params, *dict.fromkeys(args)]
    values = {**recording.lifted, **recording.foreign, **dict(enumerate(each.detach() for each in inputs))}

    def run(op: Op) -> None:
        for slot, tensor in zip(op.outs, _call(op, values), strict=True):
            if slot >= 0 and slot not in op.writes:
                values[slot] = tensor

    for op in draws:
        run(op)
    for slot, value in values.items():
        values[slot] = value.double() if value.dtype == torch.float32 else value
    for op in body:
        wide = copy.copy(op)
        wide.args = [torch.float64 if each is torch.float32 else each for each in op.args]
        wide.kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in op.kwargs.items()}
        run(wide)
    return {index: values[slot] for index, slot in enumerate(recording.grads) if slot >= 0}


def error(grads: list[Tensor | None], exact: dict[int, Tensor]) -> float:
    """Returns the error of gradients relative to their length, over all parameters."""
    squares = sum(float((grads[index].double() - each).square().sum()) for index, each in exact.items())
    return (squares / sum(float(each.square().sum()) for each in exact.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name", ["hierarchy", "logistic regression", "scale, StudentT", "LKJ", "AutoIAF", "autoencoder", "autoregression"]
)
def test_error_against_64_bits_is_at_most_twice_that_of_eager_steps(name):
    step, args = recorded(CASES[name])
    fused = fuse(shorten(step.recording), step.params)
    store = pyro.get_param_store()._params
    params = list(store.values())
    tensors = list(dict.fromkeys(args))
    errors = {"eager": 0.0, "compiled": 0.0}
    for seed in range(20):
        torch.manual_seed(seed)
        exact = gradients_in_double(step, args)
        for kind, recording in (("eager", shorten(step.recording)), ("compiled", fused.recording)):
            for param in params:
                param.grad = None
            torch.manual_seed(seed)
            assert programs.build(recording, step.params, tensors).run(store, tensors)[0] == programs.RAN
            errors[kind] += error([param.grad for param in params], exact)
    assert errors["compiled"] <= 2 * errors["eager"]


_PROCESS = """
import json
from tests.infer.capture.test_compiled import train
losses, params, capture = train(6)
print(json.dumps([losses, {name: value.tolist() for name, value in params.items()}, capture.keys, capture.notice]))
"""


def bits_of_a_process(cache: str) -> str:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, "-W", "ignore", "-c", _PROCESS]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout)[3] is None
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_processes_compute_the_same_bits_whether_they_compile_or_find_what_was_compiled(tmp_path):
    compiled_here = bits_of_a_process(str(tmp_path / "a"))
    assert bits_of_a_process(str(tmp_path / "a")) == compiled_here  # found
    assert bits_of_a_process(str(tmp_path / "b")) == compiled_here  # compiled anew


def run_on_rank(capture: str):
    losses, params, steps = train(10, capture=capture)
    return losses, {name: value.tolist() for name, value in params.items()}, steps.notice, steps.num_captured


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ranks_compile_once_and_stay_equal():
    results = world("torch_dist", 2).run(run_on_rank, "compiled")
    assert results[0] == results[1]
    assert results[0][2:] == (None, 10)

"""Compiled steps: as exact as eager ones, the same bits from every process, and captured ones where they cannot be."""

import logging
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer import SVI, TensorRows, seed_all
from distopt.infer.capture import compiled, inductor
from distopt.infer.capture import program as programs
from distopt.infer.capture.cuda_graph import NoGraphError
from distopt.infer.capture.recording import Recording, TensorInfo
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


def _filled_one_by_one(x):
    loc = torch.zeros(3)
    loc[0] = 1.0
    loc[1] = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc.sum(), 1.0), obs=x)


def _shuffled_and_filled(x):
    loc = torch.arange(3.0).mul_(2.0)
    chosen = torch.randint(2, (3,)).mul_(2).add_(1)
    loc[1] = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal((loc * chosen).sum(), 1.0), obs=x)


def _filled_with_draws(x):
    loc = torch.zeros(len(x))
    loc[:2] = pyro.sample("loc", dist.Normal(0.0, 1.0))
    loc += torch.randn(len(x))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.mark.parametrize("model", [_filled_one_by_one, _shuffled_and_filled, _filled_with_draws])
def test_tensors_that_a_model_fills_one_by_one_are_compiled(model):
    losses, params, capture = train(8, model=model)
    assert (capture.notice, capture.num_captured) == (None, 8)
    eager_losses, eager, _ = train(8, model=model, capture="off")
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    for name, param in params.items():
        torch.testing.assert_close(param, eager[name])


def _drawn_from_and_filled(x):
    loc = torch.zeros(2)
    chosen = torch.bernoulli(loc + 0.5)
    loc[0] = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal((loc * chosen).sum(), 1.0), obs=x)


def _overwritten(x):
    draw = torch.randn(3)
    draw[0] = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(draw.sum(), 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (_drawn_from_and_filled, "a tensor that torch has made, as by zeros(), is "),
        (_overwritten, "a random number is "),
    ],
)
def test_notice_says_what_is_changed_in_place(model, what):
    _, _, capture = train(6, model=model)
    assert capture.notice.startswith(f"{what}changed in place, ") and model.__name__ in capture.notice


def test_compiler_that_fails_or_computes_something_else_leaves_captured_steps(monkeypatch):
    eager_losses, eager, _ = train(6, capture="off")
    monkeypatch.setattr(inductor, "_functions", {})

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
        monkeypatch.setattr(inductor, "_run_compiler", function)
        losses, params, capture = train(6)
        assert capture.notice == notice
        assert capture.num_captured == 6
        assert losses == eager_losses
        assert all(torch.equal(params[name], eager[name]) for name in eager)

    monkeypatch.setattr(inductor, "_functions", {})
    monkeypatch.setattr(inductor, "_run_compiler", rounded)
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


def test_compiled_step_that_is_no_graph_of_a_gpu_stays_a_captured_one_and_that_is_said_once(monkeypatch, caplog):
    def build(recording, params, tensors):
        if any(op.is_host for op in recording.ops):
            raise NoGraphError("the step cannot be a CUDA graph: out of memory")
        return programs.build(recording, params, tensors)

    monkeypatch.setattr("distopt.infer.capture.step.uses_gpu", lambda recording: True)
    monkeypatch.setattr("distopt.infer.capture.step.build_graph", build)
    with caplog.at_level(logging.INFO, "distopt"):
        losses, _, capture = train(6)
    assert capture.num_captured == 6
    assert losses == train(6, capture="off")[0]
    messages = [record.getMessage() for record in caplog.records if "not compiled" in record.getMessage()]
    assert messages == ["steps are captured, but not compiled: the step cannot be a CUDA graph: out of memory"]


def run_on_rank(capture: str):
    losses, params, steps = train(10, capture=capture)
    return losses, {name: value.tolist() for name, value in params.items()}, steps.notice, steps.num_captured


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ranks_compile_once_and_stay_equal():
    results = world("torch_dist", 2).run(run_on_rank, "compiled")
    assert results[0] == results[1]
    assert results[0][2:] == (None, 10)


def column_that_is_filled(x):
    weights, values = pyro.param("weights", torch.ones(8)), pyro.param("values", torch.zeros(5))
    column = x[:, 0]
    many = (weights[:, None] * column).sin()  # larger than the column, which is a view of the batch
    filled = column.clone()
    filled[torch.arange(5)] = values
    pyro.sample("many", dist.Normal(many, 1.0).to_event(2), obs=torch.ones(8, len(x)))
    pyro.sample("filled", dist.Normal(filled, 1.0).to_event(1), obs=torch.ones(len(x)))


def sums_that_are_written_to(x):
    weights = pyro.param("weights", torch.ones(3))
    effects = weights * 2.0
    view = effects.view(3, 1)
    many = effects + x  # larger than the effects
    effects[0] = 0.5
    pyro.sample("many", dist.Normal(many, 1.0).to_event(2), obs=torch.ones(x.shape))
    pyro.sample("view", dist.Normal(view, 1.0).to_event(2), obs=torch.ones(3, 1))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", [column_that_is_filled, sums_that_are_written_to])
def test_compiled_step_writes_to_nothing_but_what_the_model_writes_to(model):
    torch.manual_seed(0)
    data = torch.randn(20, 3)
    given, results = data.clone(), []
    for capture in ("off", "compiled"):
        pyro.clear_param_store()
        svi = SVI(
            model, lambda x: None, DistributedOptimizer(pyro.optim.SGD({"lr": 1e-2})), Trace_ELBO(), capture=capture
        )
        losses = [svi.step(given) for _ in range(8)]
        results.append((losses, {name: value.detach() for name, value in pyro.get_param_store().items()}))
        assert torch.equal(given, data)
    assert (svi.captured.refusal, svi.captured.notice) == (None, None)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)

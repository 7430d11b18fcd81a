"""A captured step runs only where what it takes for granted holds, and returns what the step would."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture
from distopt.infer.capture.captured_step import CapturedStep, other_branch, recorded_result
from distopt.infer.capture.recorded_step import RecordedStep
from distopt.infer.capture.recording import Check, Recording
from tests.infer.capture.cases import DATA, hierarchy
from tests.infer.capture.steps import run_steps


@pytest.fixture
def captured() -> CapturedStep:
    """The step of a hierarchy, after it has run."""
    step = StepCapture(Trace_ELBO().loss_and_grads)
    run_steps(step, hierarchy, AutoNormal(hierarchy), (DATA,), 8)
    ((captured,),) = [variant.captured for variant in step._variants.values()]
    return captured


def store() -> dict[str, torch.Tensor]:
    return dict(pyro.get_param_store()._params)


def test_step_would_run_until_a_parameter_is_another_one_or_changes_its_kind(captured):
    assert captured.runs > 0 and captured.would_run(store(), [DATA])
    assert not captured.would_run(dict([*store().items()][:-1]), [DATA])
    others = {name: torch.nn.Parameter(param.detach().clone()) for name, param in store().items()}
    assert not captured.would_run(others, [DATA])
    assert not captured.would_run(store(), [DATA[1:]])
    first = next(iter(store().values()))
    first.requires_grad_(False)
    assert not captured.would_run(store(), [DATA])
    first.requires_grad_(True)
    assert captured.would_run(store(), [DATA])
    first.grad = torch.zeros_like(first)
    assert not captured.would_run(store(), [DATA])
    first.grad = None
    hook = first.register_hook(lambda grad: grad)
    assert not captured.would_run(store(), [DATA])
    hook.remove()


def test_outside_tensor_of_another_shape_is_no_outdated_value(caplog):
    data = torch.ones(5)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([len(data)]).to_event(1), obs=data)

    def change(i):
        if i == 7:  # before the step that is compared
            data.data = torch.zeros(7)

    pyro.clear_param_store()
    step = StepCapture(Trace_ELBO().loss_and_grads)
    run_steps(step, model, AutoNormal(model), (), 14, before_step=change)
    assert step.refusal is None
    assert not caplog.records


def test_checks_that_fail_in_more_than_one_step_of_four_fail_often(captured):
    for runs, failed, often in [(0, 7, False), (6, 2, False), (5, 3, True), (75, 25, False), (74, 26, True)]:
        captured.runs, captured.failed_checks = runs, failed
        assert captured.fails_often is often


@pytest.mark.parametrize("kind", [None, tuple])
def test_result_of_a_recorded_step_is_its_loss(kind):
    param = torch.ones(1)
    step = RecordedStep(
        Recording(loss_type=kind), [1.5] if kind is None else [1.5, 2.5], [param], [param], lambda: None
    )
    assert recorded_result(step) == (1.5 if kind is None else (1.5, 2.5), [param])


def recording_of(*checks: tuple[int, bool]) -> Recording:
    return Recording(checks=[Check(slot, answer, "") for slot, answer in checks])


def test_branch_is_another_one_only_where_the_same_check_answers_otherwise():
    one = recording_of((3, True), (5, False))
    assert not other_branch(one, one)
    assert other_branch(one, recording_of((3, True), (5, True)))
    assert other_branch(one, recording_of((3, False)))
    assert not other_branch(one, recording_of((4, False)))
    assert not other_branch(one, recording_of((3, True)))


def test_step_that_raises_is_left_to_the_eager_one(captured, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(captured, "program", SimpleNamespace(run=fail))
    status, result = captured.run(dict(pyro.get_param_store()._params), [DATA], None)
    assert (status, result) == (-100, None)

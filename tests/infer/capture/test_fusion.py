"""What is compiled of a recording has its bits where no compiler rounds, and is as exact as eager steps are."""

import copy

import pyro
import pytest
import torch
from torch import Tensor

from distopt.infer.capture import fusion, inductor
from distopt.infer.capture import program as programs
from distopt.infer.capture.fusion import NotCompiledError, fuse
from distopt.infer.capture.passes import shorten
from distopt.infer.capture.program import _call
from distopt.infer.capture.recorded_step import RecordedStep
from distopt.infer.capture.recording import Op
from tests.infer.capture.cases import captured_cases
from tests.infer.capture.steps import recorded
from tests.infer.test_deterministic import gradients_of_gathering

CASES = captured_cases()


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


# The graph itself needs no compiler: each of its operations run as it stands gives the bits of the recorded step.


@pytest.mark.parametrize("name", CASES)
def test_graph_that_is_compiled_has_the_bits_of_the_recording(name, monkeypatch):
    monkeypatch.setattr(inductor, "_functions", {})
    monkeypatch.setattr(inductor, "_run_compiler", lambda graph, _examples: torch.no_grad()(graph))
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
    draws, body = fusion._split(recording)
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


@pytest.mark.timeout(900)
def test_sum_over_a_mask_as_on_a_gpu_is_the_gradient_of_a_gather(monkeypatch):
    monkeypatch.setattr(fusion, "SUMS_OVER_MASKS", {"cpu"})
    plans = []
    make = fusion._Plan._add_sum_by_level
    monkeypatch.setattr(fusion._Plan, "_add_sum_by_level", lambda *args: plans.append(args) or make(*args))
    [summed] = gradients_of_gathering(1, "compiled")
    [expected] = gradients_of_gathering(1, "off")
    assert plans
    torch.testing.assert_close(summed, expected, rtol=1e-4, atol=1e-2)

"""Says what would be captured of a model's step, and what stands in the way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.infer
from torch import Tensor

from distopt.infer.capture.captured_step import CapturedStep
from distopt.infer.capture.generators import generator_states, set_generator_states
from distopt.infer.capture.step import StepCapture

_NUM_TIMED = 5


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What a captured step of a model is made of.

    Attributes:
        refusal: Why steps would stay eager, with the line of the model; None if they would be captured.
        num_recorded: Operations of the recorded step.
        num_operations: Operations that are left of them.
        num_direct: Those of them that the C++ loop computes itself.
        checks: Lines that branch on values of tensors: another answer takes an eager step.
        assumptions: Plain values that are compared before each step, as the code names them.
        eager_s: Median time of an eager step, in seconds.
        captured_s: Median time of a captured step, in seconds; NaN if steps would stay eager.
    """

    refusal: str | None
    num_recorded: int
    num_operations: int
    num_direct: int
    checks: tuple[str, ...]
    assumptions: tuple[str, ...]
    eager_s: float
    captured_s: float

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"Steps are not captured: {self.refusal}."
        lines = [
            f"Steps are captured: {self.num_recorded} operations are recorded and {self.num_operations} are left, of "
            f"which {self.num_direct} need no call of torch.",
            f"A step takes {1e3 * self.captured_s:.3g} ms instead of {1e3 * self.eager_s:.3g} ms.",
        ]
        lines += [f"A branch is checked at {line}." for line in dict.fromkeys(self.checks)]
        if self.assumptions:
            lines.append(f"Compared before each step: {', '.join(self.assumptions)}.")
        return "\n".join(lines)


def explain_capture(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    loss: pyro.infer.ELBO | None = None,
    **kwargs: Any,
) -> CaptureReport:
    """Computes some losses and gradients, without stepping, and returns what capturing them would give.

    Parameters that the model and guide create remain in the store; gradients and torch's generator are as they were.
    Buffers that the model moves itself, such as those of batch norm, have moved.

    Args:
        model: The model.
        guide: The guide.
        args: Arguments of a step.
        loss: The ELBO; a `Trace_ELBO` by default.
        kwargs: Keyword arguments of a step.

    Raises:
        Exception: Whatever an eager step raises.

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(data)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0 + abs(data.mean().item())), obs=data)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> explain_capture(model, guide, torch.ones(3)).refusal.split(", at ")[0]
        '.item() reads a value that differs from step to step'
    """
    elbo = pyro.infer.Trace_ELBO() if loss is None else loss
    rng_states = generator_states()
    capture = StepCapture(elbo.loss_and_grads)
    grads = {param: param.grad for param in pyro.get_param_store()._params.values()}
    _drop_grads(grads)
    times: dict[str, list[float]] = {"eager": [], "captured": []}

    # Step 1 is eager, 2 and 3 are recorded; a branch that goes two ways may need some more. From then on captured and
    # eager steps take turns, so that a slow moment of the machine meets both.
    try:
        while capture.num_steps < 3 * _NUM_TIMED and len(times["captured"]) < _NUM_TIMED:
            captured = capture.num_captured
            start = time.perf_counter()
            result = capture(model, guide, *args, **kwargs)
            if capture.num_captured > captured:
                times["captured"].append(time.perf_counter() - start)
            _drop_grads(result.params)
            start = time.perf_counter()
            elbo.loss_and_grads(model, guide, *args, **kwargs)
            times["eager"].append(time.perf_counter() - start)
            _drop_grads(result.params)
            if capture.refusal is not None:
                break
    finally:
        set_generator_states(rng_states)
        _drop_grads(pyro.get_param_store()._params.values())
        for param, grad in grads.items():
            param.grad = grad
    programs = [each for variant in capture._variants.values() for each in variant.captured]
    return _report(capture.refusal, programs[0] if programs else None, times)


def _drop_grads(params: Iterable[Tensor]) -> None:
    for param in params:
        param.grad = None


def _report(refusal: str | None, captured: CapturedStep | None, times: dict[str, list[float]]) -> CaptureReport:
    eager = statistics.median(times["eager"])
    if captured is None:
        reason = refusal or "the step took another branch each time"
        return CaptureReport(reason, 0, 0, 0, (), (), eager, float("nan"))
    return CaptureReport(
        refusal,
        len(captured.recording.ops),
        len(captured.short.ops),
        getattr(captured.program, "num_direct", 0),
        tuple(check.line for check in captured.recording.checks),
        tuple(captured.assumptions.names()),
        eager,
        statistics.median(times["captured"]) if times["captured"] else float("nan"),
    )

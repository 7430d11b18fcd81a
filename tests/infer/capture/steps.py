"""Takes steps eagerly and through `StepCapture`, and compares them bit by bit."""

import copy
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from distopt.infer.capture import StepCapture
from distopt.infer.capture.recorded_step import RecordedStep, record_step
from distopt.infer.capture.recording import same_bits


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


class EagerSteps:
    """What `StepCapture` is compared with: Pyro's own way."""

    def __init__(self, loss_and_grads):
        self.loss_and_grads = loss_and_grads

    def __call__(self, model, guide, *args, **kwargs):
        with poutine.trace(param_only=True) as capture:
            loss = self.loss_and_grads(model, guide, *args, **kwargs)
        return loss, [site["value"].unconstrained() for site in capture.trace.nodes.values()]


def run_steps(step, model, guide, args, num_steps=20, *, keep_grads=False, before_step=None) -> dict[str, Any]:
    """Takes steps with Adam, and returns everything that they computed.

    Args:
        step: Called as `step(model, guide, *args)`.
        model: The model.
        guide: The guide.
        args: The arguments, or a function that returns those of a step.
        num_steps: How many.
        keep_grads: Whether gradients are zeroed as Pyro does, or dropped.
        before_step: Called with the step's index before each step.
    """
    optim = pyro.optim.Adam({"lr": 0.01})
    losses, grads = [], []
    for i in range(num_steps):
        if before_step is not None:
            before_step(i)
        loss, params = step(model, guide, *(args(i) if callable(args) else args))
        losses.append(loss)
        named = {name: param for name, param in pyro.get_param_store()._params.items() if param.grad is not None}
        grads.append({name: param.grad.clone() for name, param in named.items()})
        optim(set(params))
        if keep_grads:
            pyro.infer.util.zero_grads(set(params))
        else:
            for param in params:
                param.grad = None
    store = {name: param.detach().clone() for name, param in pyro.get_param_store()._params.items()}
    return {"losses": losses, "grads": grads, "store": store, "rng": torch.get_rng_state()}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Asserts that two runs agree in every bit."""
    for i, (one, other) in enumerate(zip(a["losses"], b["losses"], strict=True)):
        assert repr(one) == repr(other), f"losses of step {i}"
    for i, (one, other) in enumerate(zip(a["grads"], b["grads"], strict=True)):
        assert list(one) == list(other)
        for name in one:
            assert same_bits(one[name], other[name]), f"gradient of {name} at step {i}: {one[name]}, {other[name]}"
            assert one[name].stride() == other[name].stride()
    assert list(a["store"]) == list(b["store"])
    for name in a["store"]:
        assert same_bits(a["store"][name], b["store"][name]), name
    assert torch.equal(a["rng"], b["rng"])


def compare(case, num_steps=20, *, seed=0, keep_grads=False, direct=True) -> StepCapture:
    """Runs a case both ways, asserts that both agree, and returns the capture."""
    attributes = vars(case.model) if hasattr(case.model, "__dict__") else {}
    modules = [value for value in attributes.values() if isinstance(value, torch.nn.Module)]
    modules += [case.model] if isinstance(case.model, torch.nn.Module) else []
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    results = []
    for kind in ("eager", "captured"):
        pyro.clear_param_store()
        torch.manual_seed(seed)
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
            module.zero_grad(set_to_none=True)
        loss_and_grads = case.elbo().loss_and_grads
        step = EagerSteps(loss_and_grads) if kind == "eager" else StepCapture(loss_and_grads, direct=direct)
        if case.before_step is not None:
            case.before_step(0)
        how = {"keep_grads": keep_grads, "before_step": case.before_step}
        results.append(run_steps(step, case.model, case.guide(case.model), case.args, num_steps, **how))
        for module in modules:
            results[-1]["store"] |= {f"buffer {name}": buffer.clone() for name, buffer in module.named_buffers()}
    assert_same(*results)
    return step

"""Compiled steps on the GPU: the kernels of torch's compiler in one CUDA graph."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import distopt.optim
from distopt.infer import SVI
from tests.benchmarks.step_models import WORKLOADS
from tests.gpu.checks import Figures, Suite, median_ms, synchronize
from tests.gpu.steps import case_of

SUITE = Suite("compiled", 80)


def svi_on(name: str, device: torch.device, capture: Any) -> tuple[SVI, Any]:
    """Returns an SVI of a model of `make bench ARGS=step`, and a batch, on the device; the store and seed are fresh."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, batches, lr = WORKLOADS[name]()
    batch = tuple(each.to(device) for each in batches[0])
    return SVI(model, guide, distopt.optim.Adam({"lr": lr}), Trace_ELBO(), capture=capture), batch


@contextlib.contextmanager
def default(device: torch.device) -> Iterator[None]:
    """Makes a device the default one: constants of the models are made there."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@SUITE.check("compiled steps: losses near eager ones, the same random numbers, the same bits again")
def _near_eager(device: torch.device) -> Figures:
    worst = 0.0
    for case in ("AutoNormal", "mean field"):
        compiled, again = (case_of(case, device, "compiled") for _ in range(2))
        eager = case_of(case, device, "off")
        assert compiled.refusal is None, f"{case}: {compiled.refusal}"
        assert compiled.notice is None, f"{case}: {compiled.notice}"
        assert torch.equal(compiled.generator, eager.generator), f"{case}: the generator stands elsewhere"
        error = max(abs(a - b) / (1 + abs(b)) for a, b in zip(compiled.losses, eager.losses, strict=True))
        assert error < 1e-4, f"{case}: losses differ by {error:.2e}"
        assert compiled.losses == again.losses, f"{case}: not the same bits"
        worst = max(worst, error)
    return {"worst": worst}


@SUITE.check("a plate of 200,000 x 8 latent variables: the same bits again, gradients near eager ones, time")
def _plate(device: torch.device) -> Figures:
    return compare("plate", device)


@SUITE.check("51 sample sites over 5,000 rows: the same")
def _sites(device: torch.device) -> Figures:
    return compare("51 sites", device)


def compare(name: str, device: torch.device) -> Figures:
    """Compares steps that are compiled, captured and eager: gradients of a step from the same values, and time."""
    with default(device):
        svi, batch = svi_on(name, device, "compiled")
        began = time.perf_counter()
        svi.step(*batch)
        synchronize(device)
        first_s = time.perf_counter() - began
        captured = svi.captured
        assert captured is not None
        assert captured.refusal is None, captured.refusal
        assert captured.notice is None, captured.notice

        gradients = {"compiled": gradients_of(captured, svi, batch)}
        gradients["again"] = gradients_of(captured, svi, batch)
        gradients["eager"] = gradients_of(Trace_ELBO().loss_and_grads, svi, batch)
        assert all(map(torch.equal, gradients["compiled"], gradients["again"])), "not the same bits"
        compiled_ms = median_ms(partial(svi.step, *batch), device)

        figures: Figures = {"compiled ms": compiled_ms, "first step s": first_s}
        for other, capture, count in (("graph", "graph", 30), ("eager", "off", 8)):
            figures[f"{other} ms"] = median_ms(partial(svi_on(name, device, capture)[0].step, *batch), device, count)
        figures["error"] = distance(gradients["compiled"], gradients["eager"])
    return figures


def gradients_of(loss_and_grads: Callable[..., Any], svi: SVI, batch: Any) -> list[Tensor]:
    """Returns the gradients of a step with the first seed."""
    pyro.set_rng_seed(1)
    params = [*pyro.get_param_store()._params.values()]
    for param in params:
        param.grad = None
    loss_and_grads(svi.model, svi.guide, *batch)
    gradients = [param.grad.clone() for param in params if param.grad is not None]
    for param in params:
        param.grad = None
    return gradients


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """Returns the largest difference, relative to the largest gradient."""
    largest = max(float(each.abs().max()) for each in others)
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True)) / largest

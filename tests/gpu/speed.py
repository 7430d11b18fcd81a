"""Ratios to torch and Pyro on the GPU; what they are depends on the card, which the report names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import distopt.optim
from distopt.backends.single import Single
from distopt.infer import SVI
from distopt.optim import DistributedOptimizer
from tests.gpu.checks import Figures, Suite, median_ms, need_cuda
from tests.gpu.steps import Models

SUITE = Suite("speed", 45)


def leaves_of(count: int, size: int, device: torch.device) -> list[Tensor]:
    pyro.clear_param_store()
    leaves = []
    for index in range(count):
        leaf = pyro.param(f"p{index:04}", torch.randn(size, device=device)).unconstrained()
        leaf.grad = torch.randn(size, device=device)
        leaves.append(leaf)
    return leaves


def step_ms(optimizer: Any, leaves: list[Tensor], device: torch.device) -> float:
    return median_ms(lambda: optimizer(leaves), device)


def torch_ms(leaves: list[Tensor], device: torch.device, **keywords: Any) -> float:
    optimizer = torch.optim.Adam(leaves, lr=0.01, **keywords)
    return median_ms(optimizer.step, device)


def compare_adam(count: int, size: int, device: torch.device) -> Figures:
    """Returns the time of a step of distopt's Adam, and the ratios of Pyro's and torch's to it."""
    ours = step_ms(distopt.optim.Adam({"lr": 0.01}), leaves_of(count, size, device), device)
    theirs = step_ms(pyro.optim.Adam({"lr": 0.01}), leaves_of(count, size, device), device)
    fused = torch_ms(leaves_of(count, size, device), device, fused=True)
    return {"ms": ours, "pyro / distopt": theirs / ours, "torch fused / distopt": fused / ours}


@SUITE.check("Adam's step of 1,000 parameters of 10 numbers")
def _small(device: torch.device) -> Figures:
    return compare_adam(1000, 10, device)


@SUITE.check("Adam's step of 10 parameters of 1,000,000 numbers")
def _large(device: torch.device) -> Figures:
    return compare_adam(10, 1_000_000, device)


@SUITE.check("what DistributedOptimizer adds to a step of 1,000 parameters in a world of one")
def _distributed(device: torch.device) -> Figures:
    plain = step_ms(distopt.optim.Adam({"lr": 0.01}), leaves_of(1000, 10, device), device)
    wrapped = DistributedOptimizer(distopt.optim.Adam({"lr": 0.01}), backend=Single(device))
    distributed = step_ms(wrapped, leaves_of(1000, 10, device), device)
    return {"ms": distributed, "distributed / plain": distributed / plain}


@SUITE.check("a whole SVI step")
def _svi(device: torch.device) -> Figures:
    def time_of(make: Any) -> float:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Models(device).latents
        svi = make(model, AutoNormal(model), Trace_ELBO())
        return median_ms(svi.step, device, count=20)

    theirs = time_of(lambda *each: pyro.infer.SVI(each[0], each[1], pyro.optim.Adam({"lr": 0.01}), each[2]))
    ours = time_of(lambda *each: SVI(each[0], each[1], distopt.optim.Adam({"lr": 0.01}), each[2]))
    captured = time_of(lambda *each: SVI(each[0], each[1], distopt.optim.Adam({"lr": 0.01}), each[2], capture="graph"))
    return {"ms": ours, "pyro / distopt": theirs / ours, "pyro / captured": theirs / captured}


@SUITE.check("memory of packed Adam beside torch's")
def _memory(device: torch.device) -> Figures:
    need_cuda(device, "torch does not count the CPU's memory")

    def peak_of(make: Callable[[list[Tensor]], Callable[[], Any]]) -> int:
        pyro.clear_param_store()
        torch.cuda.empty_cache()
        step = make(leaves_of(1000, 10_000, device))
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated(device)

    ours = peak_of(lambda leaves: partial(distopt.optim.Adam({"lr": 0.01}), leaves))
    return {"distopt / torch": ours / peak_of(lambda leaves: torch.optim.Adam(leaves, lr=0.01, fused=True).step)}

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
from tests.benchmarks.step_models import WORKLOADS
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
    return compare_steps(Models(device).latents, (), device)


@SUITE.check("a whole SVI step of 51 sample sites over 5,000 rows")
def _svi_sites(device: torch.device) -> Figures:
    return compare_workload("51 sites", device)


@SUITE.check("a whole SVI step of a plate of 200,000 x 8 latent variables")
def _svi_plate(device: torch.device) -> Figures:
    return compare_workload("plate", device)


def compare_workload(name: str, device: torch.device) -> Figures:
    """Compares steps of a model of `make bench ARGS=step`, whose constants lie on the device."""
    model, _, batches, _ = WORKLOADS[name]()
    torch.set_default_device(device)
    try:
        return compare_steps(model, tuple(each.to(device) for each in batches[0]), device)
    finally:
        torch.set_default_device(None)


def compare_steps(model: Any, args: tuple[Any, ...], device: torch.device) -> Figures:
    """Returns a captured step's time, and how much longer Pyro's and an eager one take; rounds take turns."""

    def pyro_svi(*each: Any) -> Any:
        return pyro.infer.SVI(each[0], each[1], pyro.optim.Adam({"lr": 0.01}), each[2])

    def make(capture: Any) -> Any:
        return lambda *each: SVI(each[0], each[1], distopt.optim.Adam({"lr": 0.01}), each[2], capture=capture)

    makers = {"pyro": pyro_svi, "eager": make("off"), "captured": make("graph")}
    rounds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(2):
        for name, maker in makers.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            svi = maker(model, AutoNormal(model), Trace_ELBO())
            rounds[name].append(median_ms(lambda svi=svi: svi.step(*args), device, count=8, warm=5))
    pyro_ms, eager_ms, captured_ms = (min(times) for times in rounds.values())
    return {"captured ms": captured_ms, "pyro / eager": pyro_ms / eager_ms, "pyro / captured": pyro_ms / captured_ms}


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

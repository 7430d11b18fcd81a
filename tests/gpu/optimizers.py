"""Each optimizer, packed, on the GPU: as `pyro.optim` and torch there."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.optim as pyro_optim
import torch
from torch import Tensor

import distopt.optim as ours
from tests.gpu.checks import Figures, Skip, Suite

SUITE = Suite("optimizers", 18)

ARGUMENTS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 0.1},
    "Adamax": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "ASGD": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "ClippedAdam": {"lr": 0.01, "lrd": 0.99, "clip_norm": 0.5},
    "AdagradRMSProp": {"eta": 0.1},
    "DCTAdam": {"lr": 0.01},
}
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 127, 1000, 1023, 32_768, 40_000)
NUM_STEPS = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def leaves_of(dtype: torch.dtype, device: torch.device, offset: int = 0) -> list[Tensor]:
    """Returns leaves of all sizes in Pyro's store; with an offset their memory begins off the usual alignment."""
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for index, size in enumerate(SIZES):
        values = torch.randn(size + offset, generator=generator).to(device=device, dtype=dtype)
        leaf = values[offset:].detach() if offset else values
        leaves.append(pyro.param(f"param_{index:02}", leaf).unconstrained())
    return leaves


def trajectory(optimizer: Any, dtype: torch.dtype, device: torch.device, offset: int = 0) -> list[Tensor]:
    """Returns the leaves after some steps with gradients that are the same for every optimizer."""
    leaves = leaves_of(dtype, device, offset)
    generator = torch.Generator().manual_seed(1)
    for _ in range(NUM_STEPS):
        for leaf in leaves:
            leaf.grad = torch.randn(leaf.shape, generator=generator).to(device=device, dtype=dtype)
        optimizer(leaves)
    return [leaf.detach().double() for leaf in leaves]


def compare(name: str, dtype: torch.dtype, device: torch.device, offset: int = 0, clip: Any = None) -> float:
    """Returns the largest difference from Pyro's optimizer, relative to 1 and the parameters' own size."""
    keywords = {"clip_args": clip} if clip else {}
    mine = trajectory(getattr(ours, name)(dict(ARGUMENTS[name]), **keywords), dtype, device, offset)
    theirs = trajectory(getattr(pyro_optim, name)(dict(ARGUMENTS[name]), **keywords), dtype, device, offset)
    error = max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(mine, theirs, strict=True))
    # torch's ASGD computes its rates in float32 in one of its loops, and in float64 in the other.
    tolerance = max(TOLERANCE[dtype], 1e-7) if name == "ASGD" else TOLERANCE[dtype]
    assert error <= tolerance, f"{name}, {dtype}, offset {offset}, {clip}: differs from pyro.optim by {error:.2e}"
    return error


@SUITE.check("float32 and float64, every size, as pyro.optim")
def _plain(device: torch.device) -> Figures:
    errors = {}
    for name, dtype in itertools.product(ARGUMENTS, (torch.float32, torch.float64)):
        if hasattr(pyro_optim, name):
            errors[name, dtype] = compare(name, dtype, device)
    return {"cases": len(errors), "worst": max(errors.values())}


@SUITE.check("bfloat16 and float16, as pyro.optim")
def _half(device: torch.device) -> Figures:
    names = ("Adam", "AdamW", "SGD", "RMSprop", "ClippedAdam", "Adagrad")
    errors = [compare(name, dtype, device) for name, dtype in itertools.product(names, (torch.bfloat16, torch.float16))]
    return {"cases": len(errors), "worst": max(errors)}


@SUITE.check("memory off its alignment, and clipping, as pyro.optim")
def _offset(device: torch.device) -> Figures:
    errors = [compare(name, torch.float32, device, offset) for name in ("Adam", "SGD", "RMSprop") for offset in (1, 3)]
    clips = ({"clip_norm": 0.5}, {"clip_value": 0.1})
    errors += [compare("Adam", torch.float32, device, clip=clip) for clip in clips]
    return {"cases": len(errors), "worst": max(errors)}


@SUITE.check("the switches that are chosen for speed, beside torch's plain loops")
def _switches(device: torch.device) -> Figures:
    worst = 0.0
    plain = {"fused": False, "foreach": False}
    for name in ("Adam", "AdamW", "SGD", "Adagrad"):
        for dtype in (torch.float32, torch.bfloat16):
            mine = trajectory(getattr(ours, name)(dict(ARGUMENTS[name])), dtype, device)
            slow = trajectory(getattr(ours, name)(ARGUMENTS[name] | plain), dtype, device)
            error = max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(mine, slow, strict=True))
            assert error <= TOLERANCE[dtype], f"{name}, {dtype}: differs from the plain loop by {error:.2e}"
            worst = max(worst, error)
    return {"worst": worst}


@SUITE.check("an optimizer's step does not wait for the GPU")
def _no_waits(device: torch.device) -> Figures:
    if device.type != "cuda":
        raise Skip("no GPU: tests/gpu/audit.py counts waits without one")
    for name in ("Adam", "AdamW", "SGD", "RMSprop", "ClippedAdam", "AdagradRMSProp", "DCTAdam"):
        optimizer = getattr(ours, name)(dict(ARGUMENTS[name]), clip_args={"clip_norm": 1.0})
        leaves = leaves_of(torch.float32, device)
        for step in range(6):
            for leaf in leaves:
                leaf.grad = torch.ones_like(leaf)
            torch.cuda.set_sync_debug_mode("error" if step >= 3 else "default")
            try:
                optimizer(leaves)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {}

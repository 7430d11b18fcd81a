"""Whole SVI steps on the GPU, and captured ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import distopt.optim
from distopt.infer import SVI, explain_capture
from tests.gpu.checks import Figures, Skip, Suite

SUITE = Suite("steps", 45)


class Models:
    """Models whose constants lie on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, generator=generator).to(device)
        self.y = 2 * self.x + 1
        self.zero = torch.zeros((), device=device)
        self.one = torch.ones((), device=device)

    def regression(self) -> None:
        slope = pyro.sample("slope", dist.Normal(self.zero, self.one))
        scale = pyro.sample("scale", dist.LogNormal(self.zero, self.one))
        with pyro.plate("rows", len(self.x), device=str(self.device)):
            pyro.sample("y", dist.Normal(slope * self.x, scale), obs=self.y)

    def latents(self) -> None:
        mean = pyro.sample("mean", dist.Normal(self.zero, self.one))
        with pyro.plate("rows", len(self.x), device=str(self.device)):
            z = pyro.sample("z", dist.Normal(mean, self.one))
            pyro.sample("y", dist.Normal(z, self.one), obs=self.y)

    def mixture(self) -> None:
        locs = pyro.sample("locs", dist.Normal(self.zero, self.one).expand([2]).to_event(1))
        with pyro.plate("rows", len(self.x), device=str(self.device)):
            half = torch.ones(2, device=self.device) / 2
            which = pyro.sample("which", dist.Categorical(half), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(locs[which], self.one), obs=self.y)


CASES: dict[str, tuple[str, Any, Callable[[], Any]]] = {
    "AutoNormal": ("regression", AutoNormal, Trace_ELBO),
    "AutoDelta": ("regression", AutoDelta, Trace_ELBO),
    "joint guide": ("regression", AutoMultivariateNormal, Trace_ELBO),
    "mean field": ("latents", AutoNormal, TraceMeanField_ELBO),
    "enumeration": ("mixture", AutoNormal, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
}


def guide_of(model: Any, kind: Any) -> Any:
    hidden = pyro.poutine.block(model, hide=["which"])
    return kind(hidden)


def losses(case: str, device: torch.device, make_svi: Callable[..., Any], num_steps: int = 20) -> list[float]:
    """Returns the losses of some steps from the same seed."""
    model_name, kind, loss = CASES[case]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = getattr(Models(device), model_name)
    if model_name == "mixture":
        model = config_enumerate(model)
    svi = make_svi(model, guide_of(model, kind), loss())
    return [float(svi.step()) for _ in range(num_steps)]


def pyro_svi(model: Any, guide: Any, loss: Any) -> Any:
    return pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)


def our_svi(model: Any, guide: Any, loss: Any) -> Any:
    return SVI(model, guide, distopt.optim.Adam({"lr": 0.05}), loss)


def captured_svi(model: Any, guide: Any, loss: Any) -> Any:
    return SVI(model, guide, distopt.optim.Adam({"lr": 0.05}), loss, capture="graph")


@SUITE.check("losses of 20 steps as Pyro's")
def _eager(device: torch.device) -> Figures:
    worst = 0.0
    for case in CASES:
        theirs, mine = losses(case, device, pyro_svi), losses(case, device, our_svi)
        error = max(abs(a - b) / (1 + abs(b)) for a, b in zip(mine, theirs, strict=True))
        assert error < 1e-4, f"{case}: losses differ by {error:.2e}"
        worst = max(worst, error)
    return {"worst": worst}


@SUITE.check("captured steps: the losses of eager ones")
def _captured(device: torch.device) -> Figures:
    explanation = str(explain_capture(Models(device).regression, AutoNormal(Models(device).regression)))
    for case in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            captured = losses(case, device, captured_svi)
        eager = losses(case, device, our_svi)
        assert captured == eager, f"{case}: {captured} captured, {eager} eager"
    return {"captured": explanation.splitlines()[0][:80]}


@SUITE.check("mixed precision: the loss of bfloat16 is near float32's")
def _mixed(device: torch.device) -> Figures:
    def step(model: Any, guide: Any, loss: Any) -> Any:
        svi = our_svi(model, guide, loss)
        eager = svi.step

        def mixed() -> Any:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return eager()

        svi.step = mixed
        return svi

    full, mixed = losses("AutoNormal", device, our_svi), losses("AutoNormal", device, step)
    error = abs(full[-1] - mixed[-1]) / abs(full[-1])
    assert error < 0.05, f"the last loss is {mixed[-1]}, {full[-1]} in float32"
    return {"error": error}


@SUITE.check("float16 with a scaler skips a step that overflows and goes on")
def _scaler(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("no GPU: tests/optim/test_amp.py has it for the CPU")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**120)
    pyro.clear_param_store()
    leaf: Tensor = pyro.param("p", torch.zeros(10, device=device)).unconstrained()
    optimizer = distopt.optim.Adam({"lr": 0.1}, scaler=scaler)
    for _ in range(3):
        leaf.grad = torch.full_like(leaf, 1.0) * scaler.scale(torch.full((), 2.0**10, device=device))
        optimizer([leaf])
    assert torch.equal(leaf.detach(), torch.zeros_like(leaf)), "a gradient that is not finite was stepped by"
    assert scaler.get_scale() < 2.0**120

"""Whole SVI steps on the GPU, and captured ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

import distopt.optim
from distopt.backends.single import Single
from distopt.infer import SVI
from distopt.optim import DistributedOptimizer
from tests.gpu.checks import Figures, Skip, Suite, need_cuda

SUITE = Suite("steps", 23)


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


def model_guide_loss(case: str, device: torch.device) -> tuple[Any, Any, Any]:
    """Returns model, guide and loss of one of `CASES`, with an empty parameter store and the first seed."""
    model_name, kind, loss = CASES[case]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = getattr(Models(device), model_name)
    if model_name == "mixture":
        model = config_enumerate(model)
    return model, guide_of(model, kind), loss()


def losses(case: str, device: torch.device, make_svi: Callable[..., Any], num_steps: int = 20) -> list[float]:
    """Returns the losses of some steps from the same seed."""
    svi = make_svi(*model_guide_loss(case, device))
    return [float(svi.step()) for _ in range(num_steps)]


def pyro_svi(model: Any, guide: Any, loss: Any) -> Any:
    return pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss)


def our_svi(model: Any, guide: Any, loss: Any) -> Any:
    return SVI(model, guide, distopt.optim.Adam({"lr": 0.05}), loss)


@SUITE.check("losses of 20 steps as Pyro's")
def _eager(device: torch.device) -> Figures:
    worst = 0.0
    for case in CASES:
        theirs, mine = losses(case, device, pyro_svi), losses(case, device, our_svi)
        error = max(abs(a - b) / (1 + abs(b)) for a, b in zip(mine, theirs, strict=True))
        assert error < 1e-4, f"{case}: losses differ by {error:.2e}"
        worst = max(worst, error)
    return {"worst": worst}


class Trajectory(NamedTuple):
    """What some steps leave behind."""

    losses: list[float]
    params: dict[str, Tensor]
    generator: Tensor
    num_captured: int
    refusal: str | None
    notice: str | None = None


def trajectory(model: Any, guide: Any, loss: Any, device: torch.device, capture: Any, **options: Any) -> Trajectory:
    """Returns what 20 steps leave behind; `options`: `args(step)` returns a step's arguments, `wrap` an optimizer."""
    pyro.set_rng_seed(0)
    optimizer = distopt.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, options.get("wrap", lambda each: each)(optimizer), loss, capture=capture)
    args = options.get("args", lambda step: ())
    values = [float(svi.step(*args(step))) for step in range(20)]
    params = {name: param.detach().clone() for name, param in pyro.get_param_store().items()}
    generator = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    captured = svi.captured
    if captured is None:
        return Trajectory(values, params, generator, 0, None)
    return Trajectory(values, params, generator, captured.num_captured, captured.refusal, captured.notice)


def assert_same(name: str, captured: Trajectory, eager: Trajectory) -> None:
    assert captured.losses == eager.losses, f"{name}: losses {captured.losses} captured, {eager.losses} eager"
    assert torch.equal(captured.generator, eager.generator), f"{name}: the generator stands elsewhere"
    for key, value in eager.params.items():
        assert torch.equal(captured.params[key], value), f"{name}: {key} differs"


def case_of(case: str, device: torch.device, capture: Any, **options: Any) -> Trajectory:
    """Returns the trajectory of one of `CASES`."""
    return trajectory(*model_guide_loss(case, device), device, capture, **options)


@SUITE.check("captured steps: losses, parameters and generator of eager ones, bit for bit")
def _captured(device: torch.device) -> Figures:
    counts = {}
    for case in CASES:
        captured = case_of(case, device, "graph")
        assert captured.refusal is None, f"{case}: {captured.refusal}"
        assert_same(case, captured, case_of(case, device, "off"))
        counts[case] = captured.num_captured
    assert min(counts.values()) >= 12, counts
    return {"captured of 20": min(counts.values())}


@SUITE.check("captured steps of a DistributedOptimizer, and with arguments that change")
def _captured_distributed(device: torch.device) -> Figures:
    def wrap(optimizer: Any) -> Any:
        return DistributedOptimizer(optimizer, backend=Single(device))

    captured = case_of("AutoNormal", device, "graph", wrap=wrap)
    assert captured.num_captured >= 12, captured.refusal
    assert_same("distributed", captured, case_of("AutoNormal", device, "off", wrap=wrap))

    generator = torch.Generator().manual_seed(5)
    batches = [torch.randn(64, generator=generator).to(device) for _ in range(20)]
    columns = (torch.randn(500, generator=generator).to(device),)
    rows = [torch.randint(500, (64,), generator=generator).to(device) for _ in range(20)]
    models = Models(device)

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(models.zero, models.one))
        with pyro.plate("rows", 64, device=str(device)):
            pyro.sample("x", dist.Normal(mean, models.one), obs=x)

    def run(capture: Any, args: Any) -> Trajectory:
        pyro.clear_param_store()
        return trajectory(model, AutoNormal(model), Trace_ELBO(), device, capture, args=args)

    def batch(step: int) -> tuple[Tensor]:
        return (batches[step],)

    def selected(step: int) -> tuple[Tensor]:
        return (columns[0][rows[step]],)

    assert_same("batches", run("graph", batch), run("off", batch))
    assert_same("selected", run("graph", selected), run("off", selected))
    return {}


@SUITE.check("captured steps of networks, branches, and a default device")
def _captured_more(device: torch.device) -> Figures:
    models = Models(device)

    def network(capture: Any) -> Trajectory:
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)).to(device)
        x = torch.randn(256, 4, generator=torch.Generator().manual_seed(3)).to(device)

        def model() -> None:
            module = pyro.module("net", net)
            with pyro.plate("rows", 256, device=str(device)):
                pyro.sample("y", dist.Normal(module(x).squeeze(-1), models.one), obs=models.y)

        result = trajectory(model, lambda: None, Trace_ELBO(), device, capture)
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        return result._replace(params=result.params | buffers)

    def branch(capture: Any) -> Trajectory:
        pyro.clear_param_store()

        def model() -> None:
            mean = pyro.sample("mean", dist.Normal(models.zero, models.one))
            scale = models.one if mean > 0 else 2 * models.one
            pyro.sample("y", dist.Normal(mean, scale), obs=models.one)

        return trajectory(model, AutoNormal(model), Trace_ELBO(), device, capture)

    def numbers(capture: Any) -> Trajectory:
        pyro.clear_param_store()

        def model() -> None:
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 256):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=models.y)

        torch.set_default_device(device)
        try:
            return trajectory(model, AutoNormal(model), Trace_ELBO(), device, capture)
        finally:
            torch.set_default_device(None)

    counts = {}
    for name, run in {"network": network, "branch": branch, "default device": numbers}.items():
        captured = run("graph")
        assert captured.refusal is None, f"{name}: {captured.refusal}"
        assert_same(name, captured, run("off"))
        counts[name] = captured.num_captured
    return counts


@SUITE.check("steps that cannot be a CUDA graph stay eager, and later ones are sound")
def _not_captured(device: torch.device) -> Figures:
    need_cuda(device, "they are captured on the CPU")
    models = Models(device)
    mask = models.x > 0

    def masked() -> None:
        mean = pyro.sample("mean", dist.Normal(models.zero, models.one))
        kept = models.y[mask]
        with pyro.plate("rows", len(kept), device=str(device)):
            pyro.sample("y", dist.Normal(mean, models.one), obs=kept)

    def random_on_cpu() -> None:
        mean = pyro.sample("mean", dist.Normal(models.zero, models.one))
        drawn = torch.randn(256).to(device)
        with pyro.plate("rows", 256, device=str(device)):
            pyro.sample("y", dist.Normal(mean + drawn, models.one), obs=models.y)

    reasons = {}
    for name, model in {"masked": masked, "random on the CPU": random_on_cpu}.items():
        results = []
        for capture in ("graph", "off"):
            pyro.clear_param_store()
            results.append(trajectory(model, AutoNormal(model), Trace_ELBO(), device, capture))
        assert_same(name, *results)
        reasons[name] = str(results[0].refusal)[:60]
    assert_same("afterwards", case_of("AutoNormal", device, "graph"), case_of("AutoNormal", device, "off"))
    return reasons


@SUITE.check("mixed precision: the loss of bfloat16 is near float32's")
def _mixed(device: torch.device) -> Figures:
    def step(model: Any, guide: Any, loss: Any) -> Any:
        svi = our_svi(model, guide, loss)
        eager = svi.step

        def mixed(*args: Any) -> Any:
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

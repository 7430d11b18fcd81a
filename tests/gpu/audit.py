"""Counts what a GPU would have to be waited for, on a machine without one: `python -m tests.gpu.audit`.

Each scenario runs on the device of `far_device.py`, whose memory the host cannot read: code that assumes the CPU
crashes, and each wait of the host for the device is counted, with the line that waits. `test_audit.py` holds the
counts.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import distopt.optim as pyro_optimizers
from distopt.checkpoint import Checkpointer
from distopt.data import TensorSource
from distopt.infer import SVI, sharded_plate
from distopt.optim import DistributedOptimizer, PyroOptim, ReduceOptions
from distopt.train.loop import run as run_config
from tests.gpu.far_device import FAR, FarSingle, Mirror, Waits

NUM_STEPS = 3
"""Steps that are counted, after as many that may build what the steady state uses."""

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"lr": 0.01},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "ASGD": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "ClippedAdam": {"lr": 0.01, "lrd": 0.99},
    "AdagradRMSProp": {"eta": 0.1},
    "DCTAdam": {"lr": 0.01},
}
CLIPS: dict[str, dict[str, float]] = {
    "norm": {"clip_norm": 0.5},
    "value": {"clip_value": 0.1},
    "global norm": {"global_norm": 1.0},
}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "average": {},
    "sum": {"op": "sum"},
    "overlap": {"overlap": True},
    "fp16": {"compression": "fp16"},
    "bf16": {"compression": "bf16"},
    "two buckets": {"groups": 2},
    "drift watch at each step": {"drift_every_steps": 1},
}


def parameters(device: torch.device, seed: int = 0) -> list[Tensor]:
    """Returns leaves of several shapes, in Pyro's store; one is too large to be packed."""
    pyro.clear_param_store()
    generator = torch.Generator().manual_seed(seed)
    leaves = []
    for index, shape in enumerate([(3,), (), (4, 5), (7,), (40_000,)]):
        leaf = torch.randn(shape, generator=generator).to(device)
        leaves.append(pyro.param(f"param_{index}", leaf).unconstrained())
    return leaves


def set_gradients(leaves: list[Tensor], step: int) -> None:
    """Gives each leaf a new gradient, the same on every device."""
    generator = torch.Generator().manual_seed(100 + step)
    for leaf in leaves:
        leaf.grad = torch.randn(leaf.shape, generator=generator).to(leaf.device)


def trajectory(make: Callable[[], Any], device: torch.device) -> tuple[list[Tensor], Waits]:
    """Returns the parameters after a few steps, as tensors of the CPU, and what the later half of the steps waited for.

    What `set_gradients` copies is not counted.
    """
    leaves = parameters(device)
    optimizer = make()
    waits = Waits()
    for step in range(2 * NUM_STEPS):
        set_gradients(leaves, step)
        if step < NUM_STEPS:
            optimizer(leaves)
            continue
        with waits:
            optimizer(leaves)
    return [leaf.detach().cpu() for leaf in leaves], waits


def figures(waits: Waits, num_steps: int = NUM_STEPS, **more: Any) -> dict[str, Any]:
    """Returns the counts for each step, and the lines."""
    return {
        "waits": waits.num_waits / num_steps,
        "copies": waits.num_copies / num_steps,
        "operations": waits.num_operations / num_steps,
        "lines": dict(waits.waits),
    } | more


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    """Returns the largest difference of two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


def optimizer_of(name: str, clip: dict[str, float] | None = None) -> PyroOptim:
    kwargs = {} if clip is None else {"clip_args": clip}
    optimizer: PyroOptim = getattr(pyro_optimizers, name)(OPTIMIZERS[name], **kwargs)
    return optimizer


def optimizers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each optimizer's step, and its parameters beside those of the same steps on the CPU."""
    cases = {name: (name, None) for name in OPTIMIZERS} | {
        f"Adam, {key}": ("Adam", clip) for key, clip in CLIPS.items()
    }
    for label, (name, clip) in cases.items():
        far, waits = trajectory(lambda name=name, clip=clip: optimizer_of(name, clip), FAR)  # type: ignore[misc]
        near, _ = trajectory(lambda name=name, clip=clip: optimizer_of(name, clip), torch.device("cpu"))  # type: ignore[misc]
        yield label, figures(waits, difference=difference(far, near))


def reductions() -> Iterator[tuple[str, dict[str, Any]]]:
    """A distributed step of two ranks; their average is the gradient itself, and the parameters those of one."""
    alone, _ = trajectory(lambda: optimizer_of("Adam"), torch.device("cpu"))
    for label, keys in REDUCTIONS.items():
        _, waits = trajectory(
            lambda keys=keys: DistributedOptimizer(  # type: ignore[misc]
                optimizer_of("Adam"), backend=Mirror(), reduce=ReduceOptions(**keys)
            ),
            FAR,
        )
        yield label, figures(waits)
    far, waits = trajectory(lambda: DistributedOptimizer(optimizer_of("Adam"), backend=Mirror()), FAR)
    yield "average, compared", figures(waits, difference=difference(far, alone))


class Regression:
    """A model of a few sites, whose rows lie on the device."""

    def __init__(self, num_rows: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_rows, generator=generator).to(FAR)
        self.y = (2.0 * self.x + 1.0).detach()
        # Constants are made once: one that the model makes anew is copied to the device at each step.
        self.zero = torch.zeros((), device=FAR)
        self.one = torch.ones((), device=FAR)

    def model(self, *batch: Tensor) -> None:
        x, y = batch or (self.x, self.y)
        slope = pyro.sample("slope", dist.Normal(self.zero, self.one))
        offset = pyro.sample("offset", dist.Normal(self.zero, self.one))
        with pyro.plate("rows", len(self.x), subsample=torch.arange(len(x), device=FAR)):
            pyro.sample("y", dist.Normal(offset + slope * x, self.one), obs=y)

    def with_latents(self) -> None:
        mean = pyro.sample("mean", dist.Normal(self.zero, self.one))
        with sharded_plate("rows", len(self.x)):
            z = pyro.sample("z", dist.Normal(mean, self.one))
            pyro.sample("y", dist.Normal(z, self.one), obs=self.y)


@contextmanager
def without_validation() -> Iterator[None]:
    """Turns Pyro's checks of values off: each reads a number of each site."""
    with pyro.validation_enabled(False):
        yield


def svi_steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """A whole step: Pyro's own waits (it reads the log probability of each site), and what distopt adds to them."""
    with without_validation():
        for label, capture in {"svi, eager": "off", "svi, captured as a graph": "graph"}.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            task = Regression()
            guide = AutoNormal(task.model, init_scale=0.1)
            optimizer = DistributedOptimizer(optimizer_of("Adam"), backend=Mirror())
            svi = SVI(task.model, guide, optimizer, Trace_ELBO(), capture=capture)  # type: ignore[arg-type]
            for _ in range(6):
                svi.step()
            waits = Waits()
            with waits:
                for _ in range(NUM_STEPS):
                    svi.step()
            yield label, figures(waits)


def checkpoints() -> Iterator[tuple[str, dict[str, Any]]]:
    """A save from the device and a restore to it."""
    with tempfile.TemporaryDirectory() as folder:
        leaves = parameters(FAR)
        module = nn.BatchNorm1d(4).to(FAR)
        optimizer = DistributedOptimizer(optimizer_of("Adam"), backend=FarSingle())
        set_gradients(leaves, 0)
        optimizer(leaves)
        saved = [leaf.detach().cpu() for leaf in leaves]
        state = {"optimizer": optimizer, "module": module}

        with Checkpointer(Path(folder), state, backend=FarSingle()) as checkpointer:
            waits = Waits()
            with waits:
                checkpointer.save(1)
            checkpointer.wait()
            set_gradients(leaves, 1)
            optimizer(leaves)
            after = [leaf.detach().cpu() for leaf in leaves]

            checkpointer.restore()
            store = pyro.get_param_store()
            leaves = [store[f"param_{index}"].unconstrained() for index in range(len(leaves))]
            on_device = all(leaf.device == FAR for leaf in leaves)
            restored = [leaf.detach().cpu() for leaf in leaves]
            set_gradients(leaves, 1)
            optimizer(leaves)
            again = [leaf.detach().cpu() for leaf in leaves]
        yield (
            "save and restore",
            figures(waits, 1, difference=difference(saved, restored) + difference(after, again), on_device=on_device),
        )


class FarTask(Regression):
    """The regression as a task of a YAML run."""

    def __init__(self) -> None:
        super().__init__()
        self.guide = AutoNormal(self.model, init_scale=0.1)
        self.source = TensorSource(self.x, self.y)

    def rows(self) -> int:
        return len(self.x)

    def batch(self, rows: Any) -> tuple[Tensor, ...]:
        indices = torch.from_numpy(rows).to(FAR)
        return self.x[indices], self.y[indices]

    def report(self, report: Any) -> None:
        report.text(f"slope {float(self.guide.median()['slope']):.2f}")


def yaml_run() -> Iterator[tuple[str, dict[str, Any]]]:
    """A run of `distopt train` whose parameters and rows lie on the device."""
    from distopt.config import RunConfig

    with tempfile.TemporaryDirectory() as folder:
        config = {
            "name": "far",
            "run_dir": folder,
            "task": "tests.gpu.audit:FarTask",
            "train": {"num_steps": 20},
            "data": {"global_batch": 16},
            "optim": {"name": "Adam", "args": {"lr": 0.05}},
            "reduce": {"backend": "tests.gpu.far_device:FarSingle"},
            "checkpoint": {"every_steps": 10},
            "log": {"every_steps": 5, "tensorboard": False},
        }
        pyro.clear_param_store()
        waits = Waits()
        with waits:
            status = run_config(RunConfig.model_validate(config))
        yield "distopt train", figures(waits, 20, status=status, report=(Path(folder) / "report.html").exists())


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """The shipped configurations as with `train.device: cuda`, from their first batch to their report."""
    from distopt.config import load_config

    short = ["train.num_steps=6", "log.every_steps=3", "log.tensorboard=false", "checkpoint.every_steps=3"]
    short.append("reduce.backend=tests.gpu.far_device:FarSingle")
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        fewer = ["task_args.num_flights=2000"] if path.stem in ("aircraft", "flights") else []
        fewer += ["data.global_batch=256"] if path.stem == "flights" else []
        with tempfile.TemporaryDirectory() as folder:
            config = load_config(path, [*short, *fewer, f"run_dir={folder}"])
            # No configuration may name this device, which stands for a GPU.
            config = config.model_copy(update={"train": config.train.model_copy(update={"device": FAR.type})})
            pyro.clear_param_store()
            waits = Waits()
            with waits:
                status = run_config(config)
            devices = {param.device for _, param in pyro.get_param_store().named_parameters()}
            text = (Path(folder) / "report.html").read_text()
        yield path.stem, figures(waits, 6, status=status, on_device=devices == {FAR}, tables=text.count("<table"))


SCENARIOS = [optimizers, reductions, svi_steps, checkpoints, yaml_run, examples]


def main() -> int:
    """Runs all scenarios; prints a table, or with --json everything."""
    results: dict[str, dict[str, Any]] = {}
    for scenario in SCENARIOS:
        began = time.monotonic()
        results |= {f"{scenario.__name__}: {label}": each for label, each in scenario()}
        print(f"{scenario.__name__}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    if "--json" in sys.argv:
        print(json.dumps(results))
        return 0

    print("for each step: waits of the host, copies that it does not wait for, kernels")
    for label, each in results.items():
        details = [f"{key} {each[key]}" for key in ("difference", "status", "on_device") if key in each]
        print(f"{label:45} {each['waits']:6.2f} {each['copies']:6.2f} {each['operations']:7.1f}  {'  '.join(details)}")
        for line, count in sorted(each["lines"].items()):
            print(f"    {count:4} {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

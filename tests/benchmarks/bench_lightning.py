"""What the strategy costs beside Lightning itself, on one worker: a small step, and one that takes 20 ms or more."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch.callbacks import Callback
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import distopt.lightning  # noqa: F401  # makes the strategy known
from tests.lightning.memory import peak_bytes
from tests.workers import world

NUM_ROWS = 400
BATCH_SIZE = 4
WARM_UP = 20
REPEATS = 5
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Plan(pl.LightningModule):
    """Steps an SVI by hand, as scvi's PyroTrainingPlan does.

    Args:
        width: Of a matrix product that makes the step take longer.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.counter = nn.Parameter(torch.zeros(1))
        work = torch.randn(width, width) / width**0.5

        def model(x: Tensor) -> None:
            loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            mean = loc + 0.0 * (work @ (work * loc)).sum()
            with pyro.plate("rows", NUM_ROWS, subsample_size=len(x)):
                pyro.sample("x", dist.Normal(mean, scale), obs=x)

        self.svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([self.counter])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.svi.step(batch[0])
        self.optimizers().step()


class Clock(Callback):
    """Notes when each batch ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())

    def median_ms(self) -> float:
        ends = self.ends[WARM_UP:]
        return 1e3 * statistics.median(stop - start for start, stop in zip(ends, ends[1:], strict=False))


def step_ms(strategy: str, width: int) -> float:
    """Returns the median of a step, in ms."""
    pyro.clear_param_store()
    clock = Clock()
    trainer = pl.Trainer(strategy=strategy, callbacks=[clock], **QUIET)
    trainer.fit(Plan(width), DataLoader(TensorDataset(torch.randn(NUM_ROWS)), batch_size=BATCH_SIZE, shuffle=True))
    return clock.median_ms()


def report_memory() -> None:
    """Prints the memory of a rank for worlds of one, two and three."""
    peaks = {}
    for num_workers in (1, 2, 3):
        group = world("torch_dist", num_workers)
        group.run(peak_bytes, 600)  # loads what a first step loads
        peaks[num_workers] = max(group.run(peak_bytes, 600_000))
    for num_workers, peak in peaks.items():
        print(
            f"latents of rows on {num_workers} workers: {peak / 2**20:6.1f} MiB a worker, {peak / peaks[1]:.2f} of one"
        )


def main() -> None:
    """Prints both strategies side by side, interleaved, and the memory of sharded latents."""
    report_memory()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for width in (4, 700):
        times = [(step_ms("auto", width), step_ms("distopt", width)) for _ in range(REPEATS)]
        plain, ours = (statistics.median(each) for each in zip(*times, strict=True))
        print(
            f"matrix of {width:4}: Lightning alone {plain:7.2f} ms a step, strategy distopt {ours:7.2f} ms: "
            f"{ours - plain:+.2f} ms, {ours / plain:.2f} x"
        )


if __name__ == "__main__":
    main()

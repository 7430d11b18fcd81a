"""A task whose result tells which batches were taken, in which order, and how often."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from distopt.data import GlobalBatches

NUM_ROWS, GLOBAL_BATCH, SEED, RATE = 100, 12, 5, 0.1
CONFIG = f"""
task: order_task:Order
seed: {SEED}
data: {{global_batch: {GLOBAL_BATCH}}}
optim: {{name: SGD, args: {{lr: {RATE / NUM_ROWS}}}}}
checkpoint: {{every_steps: 5}}
log: {{every_steps: 1, tensorboard: false}}
"""


class Order:
    """The mean of a normal: each step of SGD moves it by RATE of the way to the mean of the batch."""

    def __init__(self, seconds_per_step: float = 0.0) -> None:
        self.data = torch.tensor(values(), dtype=torch.float64)
        self.seconds_per_step = seconds_per_step

    def model(self, rows):
        mean = pyro.param("mean", torch.zeros((), dtype=torch.float64))
        with pyro.plate("rows", NUM_ROWS, subsample_size=len(rows)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=rows)

    def guide(self, rows):
        pass

    def rows(self) -> int:
        return NUM_ROWS

    def batch(self, rows):
        time.sleep(self.seconds_per_step)  # a step of a real model takes a while
        return (self.data[torch.from_numpy(rows)],)

    def report(self, run) -> None:
        Path("mean.json").write_text(json.dumps(pyro.param("mean").item()))


def values() -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 1.0, NUM_ROWS)


def expected_mean(num_steps: int) -> float:
    """Returns what the mean is after each batch of the global order has been taken once, in its order."""
    batches, data, mean = GlobalBatches(NUM_ROWS, GLOBAL_BATCH, SEED), values(), 0.0
    for step in range(num_steps):
        mean += RATE * (data[batches.rows(step)].mean() - mean)
    return mean

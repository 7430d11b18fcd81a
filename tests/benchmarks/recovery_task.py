"""A task and a logger whose worker stamps how far it is."""

from __future__ import annotations

import time

import pyro
import pyro.distributions as dist
import torch

from distopt.train.loggers import Logger
from tests.benchmarks.recovery_stamps import stamp


class Mean:
    """The mean of a normal; a step takes a moment, so that a death falls into one."""

    def __init__(self) -> None:
        stamp("joined")
        self.data = torch.zeros(1000)

    def model(self, rows: torch.Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("rows", 1000, subsample_size=len(rows)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=rows)

    def guide(self, rows: torch.Tensor) -> None:
        pass

    def rows(self) -> int:
        return 1000

    def batch(self, rows) -> tuple[torch.Tensor]:
        time.sleep(0.05)
        return (self.data[torch.as_tensor(rows)],)


class Stamps(Logger):
    """Stamps what rank 0 restores and the first step behind it."""

    def start(self, run) -> None:
        stamp("restored")
        self._is_first = True

    def log(self, step, values) -> None:
        if self._is_first:
            stamp("step")
            self._is_first = False

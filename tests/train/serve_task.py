"""A task of one parameter whose steps last a little, so that there is time to ask how it is."""

from __future__ import annotations

import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor


class Mean:
    def rows(self) -> int:
        return 64

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        time.sleep(0.02)
        return (torch.from_numpy(rows).float(),)

    def model(self, x: Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("rows", self.rows(), subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mean, 10.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pass

    def report(self, report: object) -> None:
        pass

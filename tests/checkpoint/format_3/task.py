"""The task of `run.yaml`: a straight line fitted without noise, so that plain torch can compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer.autoguide import AutoDelta
from torch import Tensor, nn

NUM_ROWS = 8
X = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.5, 1.0], [0.0, 0.5], [2.0, 1.0], [-1.0, -1.0], [0.5, 0.0], [1.5, -2.0]])
Y = torch.tensor([1.5, -1.0, -2.0, 0.0, 1.0, 0.5, 1.0, 3.0])
WEIGHT, BIAS, SCALE = [[0.5, -0.25]], [0.125], 1.5


class LineModel(nn.Module):
    """y ~ Normal(w x + b, scale), scale ~ LogNormal(0, 1), with a buffer that counts the rows it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.register_buffer("num_rows_seen", torch.tensor(0))
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor(WEIGHT))
            self.line.bias.copy_(torch.tensor(BIAS))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.num_rows_seen += len(x)
        pyro.module("line", self.line)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(self.line(x).squeeze(-1), scale), obs=y)


class Line:
    """The model, a point estimate of its scale, and all rows in every step."""

    def __init__(self) -> None:
        self.model: Any = LineModel()
        self.guide: Any = AutoDelta(self.model, init_loc_fn=lambda site: torch.tensor(SCALE))

    def rows(self) -> int:
        return NUM_ROWS

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return X[rows], Y[rows]

    def report(self, report: Any) -> None:
        report.text("a line")

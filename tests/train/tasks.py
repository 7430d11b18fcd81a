"""A small task for runs of the whole loop: a straight line, with ways to misbehave."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer import autoguide
from torch import Tensor

NUM_ROWS = 1000


class Line:
    """y = slope x + level, with noise.

    Args:
        guide: name of the autoguide.
        kill_rank: rank that kills itself, once.
        kill_at: how many batches it has read when it does.
        fail_at: likewise for an exception in the model, each time.
        nan_at: likewise for a gradient that is NaN, once.
        marker: file that says that it has been done.
        more_on_rank_1: rows that only that rank counts.
    """

    def __init__(
        self,
        guide: str = "AutoNormal",
        kill_rank: int = -1,
        kill_at: int = 0,
        fail_at: int = 0,
        nan_at: int = 0,
        marker: str = "",
        more_on_rank_1: int = 0,
    ) -> None:
        rng = torch.Generator().manual_seed(3)
        self.x = torch.linspace(-1, 1, NUM_ROWS)
        self.y = 2.0 * self.x + 1.0 + 0.3 * torch.randn(NUM_ROWS, generator=rng)
        self.guide: Any = getattr(autoguide, guide)(self.model)
        self._read, self._kill, self._fail_at, self._nan_at = 0, (kill_rank, kill_at), fail_at, nan_at
        self._more = more_on_rank_1 if os.environ.get("RANK") == "1" else 0
        self._marker = Path(marker) if marker else None

    def model(self, x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        level = pyro.sample("level", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", self.rows(), subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(slope * x + level, scale), obs=y)

    def rows(self) -> int:
        return NUM_ROWS + self._more

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        self._read += 1
        rank = int(os.environ.get("RANK", "0"))
        if self._fail_at and self._read == self._fail_at and rank == 1:
            raise ValueError("these rows are rotten")
        if (rank, self._read) == self._kill and self._marker is not None and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self._read == self._nan_at:
            param = next(iter(pyro.get_param_store().values())).unconstrained()
            hook = param.register_hook(lambda gradient: (hook.remove(), gradient * torch.nan)[1])
        return self.x[rows], self.y[rows]

    def report(self, report: Any) -> None:
        report.text("a line was found")


class LineOfColumns(Line):
    """The same line, whose rows a captured step selects itself; `num_missing` rows are left out of the columns."""

    def __init__(self, num_missing: int = 0, **args: Any) -> None:
        super().__init__(**args)
        self._columns = (self.x[num_missing:], self.y[num_missing:])

    def columns(self) -> tuple[Tensor, ...]:
        return self._columns


class Straggling(Line):
    """The same line, but rank 1 joins a control group, where it may be given less of the processor.

    Args:
        group: the group's folder.
    """

    def __init__(self, group: str) -> None:
        super().__init__()
        if os.environ["RANK"] == "1":
            (Path(group) / "cgroup.procs").write_text(str(os.getpid()))

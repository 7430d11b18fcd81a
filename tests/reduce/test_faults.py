"""Ranks that fail for real: the others name the failed one, its step and cause, and end within their timeout."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import pyro
import pytest
import torch

import distopt
from distopt.backends import heartbeat
from distopt.optim import SGD, DistributedOptimizer
from tests import workers
from tests.workers import backend_name

TIMEOUT_S = 4.0

# What strikes rank 1 at step 3 -> what rank 0 must say.
MESSAGES = {
    "raises": "rank 1 failed first, at step 3 in phase 'model': ValueError: a bad row in the data",
    "is killed": "waiting for rank 1 (its process has ended; last seen at step",
    "is stopped": "waiting for rank 1 (stopped or unreachable; last seen at step",
    "leaves out a step of its loop": (
        "the ranks are at different calls of the optimizer: rank 0: step 3 (gradient), rank 1: step 4 (gradient)"
    ),
    "leaves out a call": "a rank has left out a call of the optimizer: of rank 0, 1, the variable step in",
    "exits": "rank 1 exited after step 3 while other ranks were still waiting for it",
}


def _run_train(fault: str, timeout_s: str = "8", num_steps: str = "6") -> None:
    """A plain training loop; `fault` strikes rank 1 before its call of step 3."""
    backend = distopt.init(backend_name())
    backend.barrier()
    backend.timeout = timedelta(seconds=float(timeout_s))  # from here on; processes may start at very different times
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    for step in range(int(num_steps)):
        param = pyro.param("x", torch.zeros(4)).unconstrained()
        (param.sum() * (backend.rank + 1)).backward()
        if step == 3 and backend.rank == 1:
            _strike(fault)
            if fault.startswith("leaves out a"):
                continue
        if fault == "leaves out a step of its loop":
            optim.step_with({param}, step=step)  # as the built-in loop does
        else:
            optim({param})
        param.grad = None
    print("trained:", pyro.param("x").tolist())


def _run_raise_amid_heartbeats() -> None:
    """Both ranks fail while their heartbeats are nearly always inside the store's code."""
    heartbeat.BEAT_S = 0.0
    backend = distopt.init(backend_name())
    backend.barrier()
    raise ValueError("a bad row in the data")


def _strike(fault: str) -> None:
    """Does to this process what the fault says."""
    if fault == "raises":
        raise ValueError("a bad row in the data")
    if fault == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "exits":
        sys.exit(0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fault", MESSAGES)
def test_fault_of_one_rank_is_named_by_the_other(fault: str) -> None:
    options = {"grace_s": 0.5} if fault == "is stopped" else {}  # it never ends
    statuses, started = workers.run_script("torch_dist", 2, _run_train, fault, str(TIMEOUT_S), timeout_s=120, **options)
    assert statuses[0] == 1, started.output()
    assert MESSAGES[fault] in started.output(rank=0)
    assert "trained:" not in started.output(rank=0)
    if fault == "leaves out a step of its loop":
        assert statuses[1] == 1 and MESSAGES[fault] in started.output(rank=1)
    if fault == "raises":
        assert statuses[1] == 1
        # The culprit's own traceback is in both outputs.
        assert all('raise ValueError("a bad row in the data")' in started.output(rank) for rank in (0, 1))


@pytest.mark.slow
def test_failing_process_ends_with_the_status_of_its_exception_though_its_heartbeat_is_in_the_store() -> None:
    statuses, started = workers.run_script("torch_dist", 2, _run_raise_amid_heartbeats)
    assert statuses == [1, 1], started.output()
    assert "terminate called" not in started.output()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("horovod", "raises"),
        ("horovod", "is stopped"),
        ("mpi", "raises"),
        ("mpi", "is stopped"),
    ],
)
def test_fault_of_one_rank_is_named_under_every_launcher(kind: str, fault: str) -> None:
    statuses, started = workers.run_script(kind, 2, _run_train, fault, str(TIMEOUT_S), timeout_s=120)
    assert MESSAGES[fault] in started.output()
    assert "trained:" not in started.output()
    assert statuses[0] != 0

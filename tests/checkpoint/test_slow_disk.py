"""Training steps go on while the disk does not answer."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.optim import Adam
from tests.checkpoint.faults import ROOT, TIMEOUT_S

STEPS = range(2, 22)


def train(directory):
    """A save, steps, and a look whether it has been committed in between; runs under strace."""
    value = pyro.param("x", torch.zeros(1000)).unconstrained()
    optimizer = Adam({"lr": 0.1})
    with Checkpointer(directory, {"optimizer": optimizer}, backend=Single()) as keeper:
        keeper.save(1)
        print("copied")
        for step in STEPS:
            value.grad = torch.ones_like(value)
            optimizer([value])
            print("step", step)
        print("committed:", keeper.steps())
        keeper.wait()
        print("committed:", keeper.steps())


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian package strace)")
def test_steps_go_on_while_an_fsync_hangs_and_the_checkpoint_holds_what_was_there_before(tmp_path):
    delay = "inject=fsync:delay_enter=5000000:when=1"  # microseconds, of the thread's first fsync
    script = f"from tests.checkpoint.test_slow_disk import train; train({str(tmp_path / 'run')!r})"
    strace = ["strace", "-qq", "-f", "--seccomp-bpf", "-o", str(tmp_path / "log"), "-e", "trace=fsync", "-e", delay]
    done = subprocess.run(
        [*strace, sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=4 * TIMEOUT_S
    )
    steps = [f"step {step}" for step in STEPS]
    assert done.stdout.splitlines() == ["copied", *steps, "committed: []", "committed: [1]"], done.stderr
    assert "(DELAYED)" in (tmp_path / "log").read_text()
    with Checkpointer(tmp_path / "run", backend=Single()) as keeper:
        keeper.restore()
    assert torch.equal(pyro.param("x").detach(), torch.zeros(1000))

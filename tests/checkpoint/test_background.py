"""A save is written beside training, and its errors surface."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from datetime import timedelta

import pyro
import pytest
import torch

from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError
from distopt.checkpoint.storage.posix import PosixWriteStream
from distopt.optim import Adam
from tests.checkpoint.faults import ROOT, TIMEOUT_S
from tests.checkpoint.runs import checkpointer, value


def test_error_in_the_thread_alone_surfaces_at_wait_and_nothing_is_committed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DISTOPT_FAILPOINT", "after_write:raise")
    with checkpointer(tmp_path) as keeper:
        value(1)
        keeper.save(1)
        with pytest.raises(CheckpointError, match="step 1 was NOT saved .* failpoint after_write"):
            keeper.wait()
        assert (keeper.steps(), keeper.committed_at) == ([], None)
        monkeypatch.delenv("DISTOPT_FAILPOINT")
        keeper.save(1)  # the same step again: the first try did not count
        keeper.wait()
        assert (keeper.steps(), keeper.committed_at is None) == ([1], False)
    assert "was NOT saved" in caplog.text


def test_step_goes_on_while_the_disk_is_slow_and_a_save_in_between_is_skipped_or_waits(tmp_path, monkeypatch, caplog):
    gate, entered = threading.Event(), threading.Event()
    close = PosixWriteStream.close

    def slow(sink):
        entered.set()
        assert gate.wait(60)
        close(sink)

    monkeypatch.setattr(PosixWriteStream, "close", slow)
    with checkpointer(tmp_path, when_busy="skip", timeout=timedelta(seconds=0.05)) as keeper:
        value(1)
        keeper.save(1)  # returns, though the disk does not answer
        assert entered.wait(60)
        keeper.save(2)
        assert "step 2: skipped: rank(s) [0] are still writing the previous checkpoint" in caplog.text
        with pytest.raises(CheckpointError, match="step 1: still not saved after 0.2 s"):
            keeper.wait()
        gate.set()
        keeper.save(3)  # by now it may be skipped or not
    with checkpointer(tmp_path) as keeper:
        value(4)
        keeper.save(4)
        keeper.save(5)
        keeper.wait()
        assert keeper.steps()[-2:] == [4, 5]


@pytest.mark.slow
def test_errno_of_every_kind_is_named_in_the_failure(tmp_path, monkeypatch):
    with checkpointer(tmp_path) as keeper:
        for code in (errno.EIO, errno.EDQUOT, errno.EROFS):

            def fail(sink, pieces, code=code):
                raise OSError(code, os.strerror(code))

            with monkeypatch.context() as patch:
                patch.setattr(PosixWriteStream, "write", fail)
                keeper.save(1)
                with pytest.raises(CheckpointError, match=os.strerror(code)):
                    keeper.wait()


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
    script = f"from tests.checkpoint.test_background import train; train({str(tmp_path / 'run')!r})"
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

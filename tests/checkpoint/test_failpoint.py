"""A failpoint does what the environment asks for, at its point and on its rank, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from distopt.checkpoint.failpoint import NAMES, failpoint
from distopt.launchers import FAILPOINT_VARIABLE


def test_points_do_nothing_unless_asked(monkeypatch):
    monkeypatch.delenv(FAILPOINT_VARIABLE, raising=False)
    for name in NAMES:
        failpoint(name, 0)
    monkeypatch.setenv(FAILPOINT_VARIABLE, "after_write:rank1:raise")
    failpoint("after_write", 0)
    failpoint("after_begin", 1)


@pytest.mark.parametrize("rank", ["", "rank3:"])
def test_point_raises_where_it_is_asked_to(rank, monkeypatch):
    monkeypatch.setenv(FAILPOINT_VARIABLE, f"after_prepare:{rank}raise")
    with pytest.raises(OSError, match="failpoint after_prepare"):
        failpoint("after_prepare", 3)


@pytest.mark.parametrize(
    ("wanted", "message"), [("after_lunch:kill", "no point 'after_lunch'"), ("after_write:explode", "'explode'")]
)
def test_what_is_unknown_is_refused_with_what_is_known(wanted, message, monkeypatch):
    monkeypatch.setenv(FAILPOINT_VARIABLE, wanted)
    with pytest.raises(ValueError, match=f"{message}.*known are"):
        failpoint("after_write", 0)


def test_point_kills_the_process():
    code = "from distopt.checkpoint.failpoint import failpoint; failpoint('after_gather', 2); print('alive')"
    command = ["env", f"{FAILPOINT_VARIABLE}=after_gather:rank2:kill", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")

"""Names of processes: they tell an ended process from one that runs, and from a later one of the same number."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distopt.backends.process_ends import has_ended, namespaces, this_process

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the system has no /proc")

SCRIPT = "from distopt.backends.process_ends import *; print(this_process(), flush=True); input()"


def test_end_of_another_process_is_seen():
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        name = one.stdout.readline().strip()
        assert not has_ended(name)
        one.stdin.close()
        assert os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT) is not None
        assert has_ended(name)  # though its parent has not asked for its status, and it is still listed
    assert has_ended(name)


def test_this_process_has_not_ended():
    assert not has_ended(this_process())


def test_later_process_of_the_same_number_is_another_one():
    *namespace, pid, started_at = this_process().split()
    assert has_ended(" ".join([*namespace, pid, str(int(started_at) - 1)]))


@pytest.mark.parametrize("name", ["", "another-machine pid:[1] 1 5", "no number"])
def test_of_processes_elsewhere_nothing_is_known(name):
    assert not has_ended(name)


def test_namespaces_are_those_of_processes_and_of_the_network():
    unshare = subprocess.run(["unshare", "--net", "true"], capture_output=True)
    if unshare.returncode:
        pytest.skip("this sandbox has no network namespaces")
    code = "from distopt.backends.process_ends import namespaces; print(namespaces())"
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    argv = ["unshare", "--net", sys.executable, "-c", code]
    elsewhere = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    assert here == namespaces() != elsewhere

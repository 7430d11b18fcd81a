"""No process outlives its run: the tree below a process, and what becomes of it."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from distopt.launch.worker.processes import descendants, kill_descendants
from tests.launch.launching import wait_until

TIMEOUT_S = 30
SLEEP = "import time; time.sleep(600)"
# A child that starts a child of its own and prints both process ids.
NESTED = (
    "import os, subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
    "print(os.getpid(), child.pid, flush=True)\n"
    "time.sleep(600)"
)


@pytest.fixture
def nested():
    """A process with a child; yields the pids of both."""
    process = subprocess.Popen([sys.executable, "-c", NESTED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    parent, child = map(int, process.stdout.readline().split())
    yield parent, child
    for pid in (child, parent):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()
    process.wait(TIMEOUT_S)
    process.stdout.close()


def test_descendants_are_found_at_all_depths_parents_first(nested):
    parent, child = nested
    pids = descendants(os.getpid())
    assert pids.index(parent) < pids.index(child)
    assert descendants(parent) == [child]
    assert descendants(child) == []


def test_descendants_are_killed_at_all_depths(nested):
    parent, child = nested
    assert kill_descendants(parent) == [child]
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie", "it gone", TIMEOUT_S)
    assert psutil.Process(parent).is_running()


def test_orphans_are_found_below_the_process_that_adopts_them_and_killed():
    leave_one = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=2).pid)"
    code = (
        "import os, subprocess, sys\n"
        "from distopt.launch.worker.processes import adopt_orphans, descendants, kill_descendants\n"
        "adopt_orphans()\n"
        "start = [sys.executable, '-c', *sys.argv[1:]]\n"
        "orphan = int(subprocess.run(start, stdout=subprocess.PIPE, text=True).stdout)\n"
        "print(orphan in descendants(os.getpid()), kill_descendants(os.getpid()) == [orphan])"
    )
    command = [sys.executable, "-c", code, leave_one, SLEEP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "True True\n", done.stderr


def test_status_of_a_child_that_was_killed_is_left_to_whoever_started_it():
    code = (
        "import os, subprocess, sys\n"
        "from distopt.launch.worker.processes import kill_descendants\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
        "kill_descendants(os.getpid())\n"
        "print(child.wait())"
    )
    done = subprocess.run([sys.executable, "-c", code, SLEEP], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.stdout == "-9\n", done.stderr


def test_process_dies_with_its_parent():
    code = (
        "import os, subprocess, sys, time\n"
        "from distopt.launch.worker.processes import die_with_parent\n"
        f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait(TIMEOUT_S)
    process.stdout.close()
    wait_until(lambda: not psutil.pid_exists(child), "the child gone", TIMEOUT_S)

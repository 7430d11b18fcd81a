"""What the system offers so that no process outlives its run: signals, a subreaper, the tree in /proc."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

REQUESTS = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
)  # fmt: skip
"""Ask a run to stop: signals of a launcher, Ctrl-C, a terminal that hangs up, batch systems before their limits."""


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Returns the signals that this process was not started to ignore.

    nohup has a program ignore SIGHUP, and a shell without job control has one that runs in the background ignore
    Ctrl-C. Either way the signal is not meant for it, so no handler may take its place.
    """
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


# The two calls complement each other. The death signal reaches a child whose parent is killed in whatever way, but not
# a child that a program has detached from its parent by starting it through a process that ended. Such orphans become
# children of the nearest subreaper, where they are found below its process id. Neither needs root or a control group.


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends; survives exec, not fork."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants whose own parent has died, so that they can be found."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[int]:
    """Returns the processes below `pid`, parents before children; empty where there is no /proc."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            # The name stands in parentheses and may hold any character; the fields after the last one are fixed.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):  # it ended meanwhile
            continue
        children[parent].append(int(entry.name))

    pids = [pid]
    for each in pids:  # which grows here, level by level
        pids += children[each]
    return pids[1:]


def kill_descendants(pid: int) -> list[int]:
    """Kills everything below `pid`, again and again until nothing new turns up, and returns what was killed."""
    killed: list[int] = []
    while running := [child for child in descendants(pid) if not _has_ended(child) and child not in killed]:
        for child in running:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed += running
    return killed


def _has_ended(pid: int) -> bool:
    """Whether a child of this process has ended; false for one that runs or is another's child.

    Its status is left for the `Popen` that started it, which would otherwise take a killed process for one that
    succeeded: without a child to wait for, `Popen.wait` returns 0.
    """
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False

"""What Linux offers so that no process outlives its run: death signals, a subreaper, and the tree in /proc."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


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
            # The name stands in parentheses and may hold any character: what follows the last one is fixed.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children[parent].append(int(entry.name))
    found = [pid]
    for process in found:
        found += children[process]
    return found[1:]


def kill_descendants(pid: int) -> list[int]:
    """Kills everything below `pid`, again and again until nothing new turns up; returns what was killed."""
    killed: list[int] = []
    while running := [child for child in descendants(pid) if not _reap(child) and child not in killed]:
        for child in running:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed += running
    return killed


def _reap(pid: int) -> bool:
    """Takes the exit status of a child that has ended; false for one that runs or is not ours."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False

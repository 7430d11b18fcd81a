"""What the kernel's control groups allow this process: the cores of a container, and where its limits are written.

It imports the standard library alone, as `distopt.launchers` does, since a supervisor starts with every rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")


# A limit of CPU time (`docker run --cpus`, the `limits` of a pod) hides no core: `os.cpu_count` and
# `os.sched_getaffinity` still return those of the machine. A process that starts a thread for each of 64 cores and may
# use the time of one has all of them wait for each other.


def available_cores(proc: Path = PROC) -> int:
    """Returns how many cores this process can keep busy: those that it may run on, within its limit of CPU time.

    A limit is rounded down, since a thread beyond it would be paused together with all others.

    Args:
        proc: The process's folder in /proc.

    Example:
        >>> available_cores() <= len(os.sched_getaffinity(0))
        True
    """
    return max(1, limit_of_cores(len(affinity()), proc))


def affinity() -> set[int]:
    """Returns the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def limit_of_cores(unlimited: int, proc: Path = PROC) -> int:
    """Returns how many cores this process's limit of CPU time is worth, which it shares with others of its group.

    Args:
        unlimited: What is returned where there is none, or a higher one.
        proc: The process's folder in /proc.
    """
    cores = unlimited
    for group, top in groups("cpu", proc):
        for folder in (group, *group.parents):  # the limits of the groups above hold, too
            if folder.is_relative_to(top):
                cores = min(cores, _limit(folder, cores))
    return cores


def _limit(folder: Path, unlimited: int) -> int:
    """Returns how many cores a group's limit of CPU time is worth; `unlimited` where there is none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        numbers = " ".join(_read(folder / name) for name in names).split()
        if len(numbers) == 2 and all(map(str.isdecimal, numbers)):  # without a limit: max, -1
            return int(numbers[0]) // max(1, int(numbers[1]))
    return unlimited


def groups(controller: str, proc: Path = PROC) -> Iterator[tuple[Path, Path]]:
    """Yields the folder of each control group that this process is in, and the topmost folder that is seen from here.

    Args:
        controller: A name of version 1, such as `cpu` or `memory`; version 2 has one hierarchy for all.
        proc: The process's folder in /proc.
    """
    paths = [line.split(":", 2) for line in _read(proc / "cgroup").splitlines()]
    mounts = [line.split(" ") for line in _read(proc / "mountinfo").splitlines()]
    for mount in mounts:
        # id, parent, device, root within the file system, mount point, options, …, "-", type, source, options
        dash = mount.index("-") if "-" in mount else len(mount)
        kind = mount[dash + 1] if dash + 3 < len(mount) else ""
        is_v1 = kind == "cgroup" and controller in mount[dash + 3].split(",")
        if not is_v1 and kind != "cgroup2":
            continue

        top = Path(mount[4])
        for _, controllers, path in paths:
            if (controller in controllers.split(",")) if is_v1 else not controllers:
                # A container without a cgroup namespace sees its path on the host, and its own group as the top.
                below = os.path.relpath(path, mount[3])
                yield top if below.startswith("..") else Path(os.path.normpath(top / below)), top


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

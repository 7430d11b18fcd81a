"""The cores that a container's limit of CPU time leaves, for both versions of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distopt import cgroups
from tests.control_groups import control_group

CORES = len(os.sched_getaffinity(0))


def proc_of(folder: Path, group: str, mount: str, limits: dict[str, str]) -> Path:
    """Writes what /proc says to a process in a group, and the limits that stand in the files below the mount point.

    Args:
        folder: Of the test.
        group: Lines of /proc/self/cgroup.
        mount: Root of the mount, type and options, for a line of /proc/self/mountinfo.
        limits: Texts by path below the mount point.
    """
    top = folder / "cgroup"
    for name, text in limits.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    (folder / "cgroup-of-process").mkdir()
    root, kind, options = mount.split()
    (folder / "cgroup-of-process/cgroup").write_text(group)
    (folder / "cgroup-of-process/mountinfo").write_text(
        "23 1 0:1 / / rw - overlay overlay rw\n"
        f"31 23 0:28 {root} {top} rw,relatime shared:9 - {kind} {kind} {options}\n"
    )
    return folder / "cgroup-of-process"


V2 = "/ cgroup2 rw"
V1 = "/ cgroup rw,cpu,cpuacct"


@pytest.mark.parametrize(
    ("group", "mount", "limits", "expected"),
    [
        ("0::/\n", V2, {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 1),
        ("0::/\n", V2, {"cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", V2, {"cpu.max": "max 100000\n"}, CORES),
        ("0::/\n", V2, {"cpu.max": "6400000 100000\n"}, CORES),
        ("0::/pod/worker\n", V2, {"pod/worker/cpu.max": "max 100000", "pod/cpu.max": "100000 100000"}, 1),
        ("0::/pod/worker\n", V2, {"pod/worker/cpu.max": "100000 100000", "other/cpu.max": "1 100000"}, 1),
        ("0::/a/b/pod\n", "/a/b cgroup2 rw", {"pod/cpu.max": "100000 100000"}, 1),
        ("0::/../../host\n", V2, {"cpu.max": "100000 100000\n"}, 1),
        ("4:cpu,cpuacct:/\n", V1, {"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu,cpuacct:/\n", V1, {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, CORES),
        (
            "4:cpu,cpuacct:/docker/x\n",
            "/docker/x cgroup rw,cpu",
            {"cpu.cfs_quota_us": "9", "cpu.cfs_period_us": "9"},
            1,
        ),
        ("4:memory:/\n", V1, {"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": "100000\n"}, CORES),
        ("0::/\n", V2, {}, CORES),
        ("", V2, {"cpu.max": "100000 100000\n"}, CORES),
    ],
)
def test_limit_of_cpu_time_counts_as_so_many_cores_and_one_at_least(group, mount, limits, expected, tmp_path):
    assert cgroups.available_cores(proc_of(tmp_path, group, mount, limits)) == expected


def test_machine_without_control_groups_has_the_cores_that_the_process_may_run_on(tmp_path):
    assert cgroups.available_cores(tmp_path) == CORES


def test_worker_in_a_group_with_the_time_of_one_core_starts_one_thread(tmp_path):
    """A real group, and the libraries that start threads by themselves when they are imported."""
    show = (
        "import os, torch, numpy; from distopt.train.setup import set_up_process\n"
        "from distopt.config import parse_config\n"
        "from distopt.backends.single import Single; set_up_process(parse_config('{name: x, task: a:B}'), Single())\n"
        "numpy.ones((600, 600)) @ numpy.ones((600, 600)); torch.ones(600, 600) @ torch.ones(600, 600)\n"
        "print(os.environ['OMP_NUM_THREADS'], torch.get_num_threads())"
    )
    worker = [sys.executable, "-m", "distopt.launch.worker.supervisor", "run", "--", sys.executable, "-c", show]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with control_group(
        "cpu", {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "10000"}, {"cpu.max": "10000 10000"}
    ) as group:
        shell = ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *worker]
        done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert (done.returncode, log.splitlines()[-1]) == (0, "1 1"), done.stderr + log

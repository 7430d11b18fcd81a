"""Two ranks commit together or not at all, whichever of them dies, fails or hangs at whichever message."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from distopt.checkpoint.failpoint import NAMES
from tests.checkpoint import driver, faults

OF_TRAINING = {"after_snapshot", "after_agreement"}  # passed before the protocol starts, with the process group
POINTS = [name for name in NAMES if name not in OF_TRAINING]


def save_on_two(root, step, failpoint, timeout_s):
    """Both ranks save a step; returns each one's (exit status, acknowledged, what it wrote to stderr)."""
    environment = {**os.environ, "DISTOPT_FAILPOINT": failpoint}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.driver", str(root), str(step), f"{rank}/2/{timeout_s}"],
            cwd=faults.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = []
    hanging = [int(failpoint.split(":")[1][-1])] if failpoint.endswith(":hang") else []
    for rank in [rank for rank in range(2) if rank not in hanging] + hanging:
        if rank in hanging:
            ranks[rank].kill()
        out, err = ranks[rank].communicate(timeout=30)
        done.append((rank, (ranks[rank].returncode, f"ACK {step}" in out, err)))
    return [result for _, result in sorted(done)]


@pytest.mark.parametrize("action", ["kill", "raise", "hang"])
def test_ranks_when_one_is_lost_at_any_message_commit_or_abort_together(action, tmp_path):
    faults.start(tmp_path / "start")

    def attack(point_and_rank):
        point, rank = point_and_rank
        root = tmp_path / f"{point}-{rank}"
        shutil.copytree(tmp_path / "start", root)
        ranks = save_on_two(root, 3, f"{point}:rank{rank}:{action}", timeout_s=3)
        newest = driver.newest_good(root)
        found = [f"acknowledged, but {newest} is the newest" for _, acked, _ in ranks if acked and newest != 3]
        status, acked, err = ranks[1 - rank]
        if not acked and status == 0:
            found.append("the survivor neither acknowledged nor failed")
        if newest == 3 and not acked:
            found.append("committed, and the survivor does not know")
        if newest != 3 and not re.search(r"rank(\(s\) \[| )\d", err):
            found.append(f"the survivor names no rank: {err[-300:]}")
        return found + faults.violations(root, max(2, newest), 3)

    cases = [(point, rank) for point in POINTS for rank in range(2)]
    with ThreadPoolExecutor(4) as pool:
        wrong = {case: found for case, found in zip(cases, pool.map(attack, cases), strict=True) if found}
    assert wrong == {}


def test_ranks_when_none_is_lost_both_acknowledge(tmp_path):
    faults.start(tmp_path)
    assert [(status, acked) for status, acked, _ in save_on_two(tmp_path, 3, "", 20)] == [(0, True), (0, True)]
    assert driver.newest_good(tmp_path) == 3
    assert len(list((tmp_path / "step-00000003").iterdir())) == 7


def test_rank_that_fails_is_named_with_its_cause_by_rank_0_at_once(tmp_path):
    faults.start(tmp_path)
    (status, acked, err), _ = save_on_two(tmp_path, 3, "after_write:rank1:raise", 25)
    assert status != 0 and not acked
    assert "CheckpointError: rank 1 of 2: OSError: [Errno 5] failpoint after_write" in err

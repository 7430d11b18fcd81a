"""Whatever ends or fails a save, at any system call or message, on one rank or two: all of it is there, or nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from distopt.checkpoint import Retention
from distopt.checkpoint.background import BackgroundSave
from distopt.checkpoint.commit import Attempt
from distopt.checkpoint.failpoint import NAMES
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import candidates
from distopt.checkpoint.snapshot import HostMemory, take_snapshot
from distopt.checkpoint.storage.base import open_storage
from tests.checkpoint import driver, faults, power

OF_TRAINING = {"after_snapshot", "after_agreement"}  # passed before the protocol starts, with the process group


POINTS = [name for name in NAMES if name not in OF_TRAINING]


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (Debian package strace)")


ERRORS = {
    "mkdir": ("ENOSPC", "EROFS", "EACCES"),
    "openat": ("EMFILE", "EROFS", "EACCES", "ENOSPC"),
    "writev": ("ENOSPC", "EIO", "EDQUOT", "EINTR"),
    "pwrite64": ("ENOSPC",),
    "ftruncate": ("EIO",),
    "flock": ("ENOLCK", "EINTR"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "rename": ("EIO", "EROFS", "ENOSPC"),
    "unlinkat": ("EIO", "EACCES"),
    "rmdir": ("EIO",),
    "close": ("EIO", "EINTR"),
}


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    return faults.points(tmp_path_factory.mktemp("dry"))


def attack(scratch, name, *strace):
    """One save, hit once; returns the process and what is wrong afterwards."""
    root = scratch / name
    shutil.copytree(scratch / "start", root, symlinks=True)
    result = faults.save(root, 3, *strace)
    violations = faults.violations(root, faults.acknowledged(result.stdout, 2), 3)
    shutil.rmtree(root)
    return result, violations


@pytest.mark.slow
@needs_strace
def test_save_when_killed_at_any_system_call_loses_no_acknowledged_checkpoint(points, tmp_path):
    faults.start(tmp_path / "start")
    targets = [point for point in points if point.changes]
    assert len(targets) >= 30, f"only {len(targets)} calls were found: has strace changed what it prints?"

    def kill(point):
        result, violations = attack(tmp_path, str(point), *faults.killing(point.call, point.number))
        return [] if result.returncode != 0 else ["it was not killed"], violations

    with ThreadPoolExecutor(2) as pool:
        wrong = {str(point): both for point, both in zip(targets, pool.map(kill, targets), strict=True) if any(both)}
    assert wrong == {}


@pytest.mark.slow
@needs_strace
@pytest.mark.timeout(240)
def test_save_when_any_system_call_fails_either_acknowledges_truthfully_or_fails_loudly(points, tmp_path):
    faults.start(tmp_path / "start")
    targets = [(point, error) for point in points for error in _errors(point)]
    assert len(targets) >= 60

    def fail(target):
        point, error = target
        inject = f"inject={point.call}:error={error}:when={point.number}"
        result, violations = attack(
            tmp_path, f"{point}-{error}", "-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject
        )
        if result.returncode == 0 and "ACK 3" not in result.stdout:
            violations.append("neither acknowledged nor failed")
        if result.returncode != 0 and "Error" not in result.stderr:
            violations.append("failed without a word")
        return violations

    with ThreadPoolExecutor(2) as pool:
        wrong = {
            str(target): violations
            for target, violations in zip(targets, pool.map(fail, targets), strict=True)
            if violations
        }
    assert wrong == {}


@needs_strace
def test_file_whose_fsync_failed_is_not_synced_again(points, tmp_path):
    faults.start(tmp_path / "start")
    syncs = [point for point in points if point.call == "fsync"]
    assert len(syncs) >= 7
    for point in syncs:
        root, log = tmp_path / str(point), tmp_path / "strace.log"
        shutil.copytree(tmp_path / "start", root)
        inject = f"inject=fsync:error=EIO:when={point.number}"
        faults.save(root, 3, "-o", str(log), "-e", "trace=fsync,close,writev", "-e", inject)
        _, _, after = log.read_text().partition("(INJECTED)\n")
        (descriptor,) = re.findall(r"^fsync\((\d+)\).*INJECTED", log.read_text(), re.MULTILINE)
        following = [line for line in after.splitlines() if re.match(rf"\w+\({descriptor}[,)]", line)]
        assert following[0].startswith("close("), f"{point}: {following[:3]}"


def _errors(point):
    """Each error at each call that writes; one error, at every third call that only reads."""
    if point.changes:
        return ERRORS[point.call]
    return ERRORS[point.call][:1] if point.number % 3 == 0 else ()


def needs_power_cuts(kind):
    lacking = power.missing(kind)
    if lacking:
        pytest.skip(lacking)


@pytest.mark.parametrize("kind", ["xfs", pytest.param("ext4", marks=pytest.mark.slow)])
def test_save_when_the_power_fails_at_any_system_call_loses_no_acknowledged_checkpoint(kind, points, tmp_path):
    needs_power_cuts(kind)
    targets = [point for point in points if point.changes and point.call not in ("flock", "ftruncate", "pwrite64")]
    assert len(targets) >= 25
    targets = [(0, point.call, point.number) for point in targets]
    assert power.cut_everywhere(kind, tmp_path, targets, timeout_s=120) == {}


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["no-fsync", "no-folder-fsync"])
def test_harness_when_an_fsync_is_left_out_finds_it(planted, points, tmp_path):
    needs_power_cuts("xfs")
    # Calls of the deletion after the commit: by then the step has been acknowledged.
    targets = [(0, point.call, point.number) for point in points if point.call in ("unlinkat", "rmdir")]
    assert power.cut_everywhere("xfs", tmp_path, targets, planted=planted, timeout_s=60) != {}


@pytest.mark.slow
def test_two_ranks_when_the_power_fails_at_calls_of_either_lose_no_acknowledged_checkpoint(tmp_path):
    needs_power_cuts("xfs")
    targets = [
        (rank, call, number)
        for rank, calls in power.OF_TWO.items()
        for call, count in calls.items()
        for number in range(1, count + 1)
    ]
    assert power.cut_everywhere("xfs", tmp_path, targets, world_size=2, timeout_s=120) == {}


def test_harness_when_the_second_rank_leaves_out_its_fsync_finds_it(tmp_path):
    needs_power_cuts("xfs")
    targets = [(0, "unlinkat", 1), (0, "rmdir", 1)]
    violations = power.cut_everywhere("xfs", tmp_path, targets, world_size=2, planted="no-fsync", timeout_s=60)
    assert violations.keys() == {"rank 0, unlinkat-1", "rank 0, rmdir-1"}


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


@pytest.mark.parametrize(
    "action", ["kill", pytest.param("raise", marks=pytest.mark.slow), pytest.param("hang", marks=pytest.mark.slow)]
)
def test_ranks_when_one_is_lost_at_any_message_commit_or_abort_together(action, tmp_path):
    faults.start(tmp_path / "start")

    def attack(point_and_rank):
        point, rank = point_and_rank
        root = tmp_path / f"{point}-{rank}"
        shutil.copytree(tmp_path / "start", root)
        ranks = save_on_two(root, 3, f"{point}:rank{rank}:{action}", timeout_s=3)
        newest = driver.newest_good(root)
        violations = [f"acknowledged, but {newest} is the newest" for _, acked, _ in ranks if acked and newest != 3]
        status, acked, err = ranks[1 - rank]
        if not acked and status == 0:
            violations.append("the survivor neither acknowledged nor failed")
        if newest == 3 and not acked:
            violations.append("committed, and the survivor does not know")
        if newest != 3 and not re.search(r"rank(\(s\) \[| )\d", err):
            violations.append(f"the survivor names no rank: {err[-300:]}")
        return violations + faults.violations(root, max(2, newest), 3)

    cases = [(point, rank) for point in POINTS for rank in range(2)]
    with ThreadPoolExecutor(4) as pool:
        wrong = {
            case: violations for case, violations in zip(cases, pool.map(attack, cases), strict=True) if violations
        }
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


def test_rank_that_writes_to_an_object_store_before_rank_0_does_keeps_its_files():
    storage = open_storage("memory://ahead")

    def save(rank):
        attempt = Attempt(1, "0123456789ab", rank, 2, timedelta(seconds=10))
        snapshots = {f"rank-{rank:05d}": take_snapshot({"x": torch.ones(3)}, HostMemory(), "own")}
        return BackgroundSave(
            storage, attempt, snapshots, lambda files: Manifest(1, attempt.id, 0, 2, files), Retention(2), lambda: None
        )

    leader, follower = save(0), save(1)
    follower.start()
    while ".prepared-00001.json" not in storage.files("step-00000001-0123456789ab"):
        time.sleep(0.01)
    leader.start()
    for one in (leader, follower):
        one.wait(timedelta(seconds=20))
        one.finish()
    assert [one.step for one in candidates(storage) if one.manifest] == [1]

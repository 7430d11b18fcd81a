"""Whatever ends or fails a save, at any system call: the newest acknowledged checkpoint loads, the next save works."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.checkpoint import faults, power

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
    found = faults.violations(root, faults.acknowledged(result.stdout, 2), 3)
    shutil.rmtree(root)
    return result, found


@needs_strace
def test_save_when_killed_at_any_system_call_loses_no_acknowledged_checkpoint(points, tmp_path):
    faults.start(tmp_path / "start")
    targets = [point for point in points if point.changes]
    assert len(targets) >= 30, f"only {len(targets)} calls were found: has strace changed what it prints?"

    def kill(point):
        result, found = attack(tmp_path, str(point), *faults.killing(point.call, point.number))
        return [] if result.returncode != 0 else ["it was not killed"], found

    with ThreadPoolExecutor(2) as pool:
        wrong = {str(point): both for point, both in zip(targets, pool.map(kill, targets), strict=True) if any(both)}
    assert wrong == {}


@needs_strace
@pytest.mark.timeout(240)
def test_save_when_any_system_call_fails_either_acknowledges_truthfully_or_fails_loudly(points, tmp_path):
    faults.start(tmp_path / "start")
    targets = [(point, error) for point in points for error in _errors(point)]
    assert len(targets) >= 60

    def fail(target):
        point, error = target
        inject = f"inject={point.call}:error={error}:when={point.number}"
        result, found = attack(
            tmp_path, f"{point}-{error}", "-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject
        )
        if result.returncode == 0 and "ACK 3" not in result.stdout:
            found.append("neither acknowledged nor failed")
        if result.returncode != 0 and "Error" not in result.stderr:
            found.append("failed without a word")
        return found

    with ThreadPoolExecutor(2) as pool:
        wrong = {str(target): found for target, found in zip(targets, pool.map(fail, targets), strict=True) if found}
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


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_save_when_the_power_fails_at_any_system_call_loses_no_acknowledged_checkpoint(kind, points, tmp_path):
    needs_power_cuts(kind)
    targets = [point for point in points if point.changes and point.call not in ("flock", "ftruncate", "pwrite64")]
    assert len(targets) >= 25
    targets = [(0, point.call, point.number) for point in targets]
    assert power.cut_everywhere(kind, tmp_path, targets, timeout_s=120) == {}


@pytest.mark.parametrize("planted", ["no-fsync", "no-folder-fsync"])
def test_harness_when_an_fsync_is_left_out_finds_it(planted, points, tmp_path):
    needs_power_cuts("xfs")
    # Calls of the deletion after the commit: by then the step has been acknowledged.
    targets = [(0, point.call, point.number) for point in points if point.call in ("unlinkat", "rmdir")]
    assert power.cut_everywhere("xfs", tmp_path, targets, planted=planted, timeout_s=60) != {}


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
    found = power.cut_everywhere("xfs", tmp_path, targets, world_size=2, planted="no-fsync", timeout_s=60)
    assert found.keys() == {"rank 0, unlinkat-1", "rank 0, rmdir-1"}

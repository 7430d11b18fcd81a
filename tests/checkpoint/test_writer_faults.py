"""Whatever ends or fails a save, at any system call: the newest acknowledged checkpoint loads, the next save works."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.checkpoint import faults

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
    found = faults.violations(root, faults.acknowledged(result, 2), 3)
    shutil.rmtree(root)
    return result, found


@needs_strace
def test_save_when_killed_at_any_system_call_loses_no_acknowledged_checkpoint(points, tmp_path):
    faults.start(tmp_path / "start")
    targets = [point for point in points if point.changes]
    assert len(targets) >= 30, f"only {len(targets)} calls were found: has strace changed what it prints?"

    def kill(point):
        inject = f"inject={point.call}:signal=SIGKILL:when={point.number}"
        result, found = attack(tmp_path, str(point), "-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject)
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


def _errors(point):
    """Each error at each call that writes; one error, at every third call that only reads."""
    if point.changes:
        return ERRORS[point.call]
    return ERRORS[point.call][:1] if point.number % 3 == 0 else ()


def cut_everywhere(kind, scratch, targets, planted=()):
    """Ends a save at each call, cuts the power, and returns what is wrong after the disk is mounted again."""
    wrong = {}
    with faults.disk(scratch, kind) as mount:
        step = 2
        faults.start(mount / "run")
        for point in targets:
            inject = f"inject={point.call}:signal=SIGKILL:when={point.number}"
            result = faults.save(
                mount / "run", step + 1, "-o", "/dev/null", "-e", f"trace={point.call}", "-e", inject, faults=planted
            )
            faults.cut_power(mount)
            found = faults.violations(mount / "run", faults.acknowledged(result, step), step + 1)
            step += 2
            if found:
                wrong[str(point)] = found
                shutil.rmtree(mount / "run")
                faults.start(mount / "run")
                step = 2
    return wrong


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_save_when_the_power_fails_at_any_system_call_loses_no_acknowledged_checkpoint(kind, points, tmp_path):
    lacking = faults.missing_for_power_cuts(kind)
    if lacking:
        pytest.skip(lacking)
    targets = [point for point in points if point.changes and point.call not in ("flock", "ftruncate", "pwrite64")]
    assert len(targets) >= 25
    assert cut_everywhere(kind, tmp_path, targets) == {}


@pytest.mark.parametrize("planted", ["no-fsync", "no-folder-fsync"])
def test_harness_when_an_fsync_is_left_out_finds_it(planted, points, tmp_path):
    lacking = faults.missing_for_power_cuts("xfs")
    if lacking:
        pytest.skip(lacking)
    # Calls of the deletion after the commit: by then the step has been acknowledged.
    targets = [point for point in points if point.call in ("unlinkat", "rmdir")]
    assert cut_everywhere("xfs", tmp_path, targets, (planted,)) != {}

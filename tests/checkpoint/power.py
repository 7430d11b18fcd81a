"""Disks that lose power in the middle of a save: `python -m tests.checkpoint.power KIND SCRATCH` with a plan on stdin.

It runs in a mount namespace of its own (`cut_everywhere` starts it so): whoever copies the other one's mounts meanwhile
would keep the disk mounted while we believe it has been taken away, and whatever happens here is unmounted at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.checkpoint import faults
from tests.checkpoint.faults import ROOT, TIMEOUT_S

FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
SIZES = {"xfs": 320 << 20, "ext4": 64 << 20}
OF_TWO = {
    0: {"mkdir": 1, "writev": 5, "fsync": 8, "unlink": 1, "rename": 2, "unlinkat": 3, "rmdir": 1},
    1: {"writev": 3, "fsync": 5},
}
"""What each of two ranks calls in one save, those that look for the other left out: their number is not the same."""
Target = tuple[int, str, int]
"""(rank, call, number)."""
STAGGER_S = 0.6
"""For so long one rank outlives the other: longer than it takes to look again at what the other has done."""


def cut_everywhere(
    kind: str, scratch: Path, targets: Sequence[Target], *, world_size: int = 1, planted: str = "", timeout_s: float
) -> dict[str, list[str]]:
    """Ends saves at each target, cuts the power, and returns what is wrong after the disk is mounted again."""
    plan = {"targets": list(targets), "world_size": world_size, "planted": planted}
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", __name__, kind, str(scratch)],
        cwd=ROOT,
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wrong: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])  # above it, what the saves say
    return wrong


def missing(kind: str) -> str:
    """Returns what this machine lacks for losing the power of a disk; empty when it lacks nothing."""
    if os.geteuid() != 0:
        return "needs root, to mount"
    for tool in ("strace", f"mkfs.{kind}", "mount", "losetup", "unshare"):
        if shutil.which(tool) is None:
            return f"needs {tool} (Debian: strace, xfsprogs, e2fsprogs, mount, util-linux)"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    return ""


def _attack(kind: str, scratch: Path, targets: Sequence[Target], world_size: int, planted: str) -> dict[str, list[str]]:
    wrong = {}
    with _disk(scratch, kind) as (device, mount):
        step = 2
        faults.start(mount / "run")
        for rank, call, number in targets:
            output = _save(mount / "run", step + 1, faults.killing(call, number), rank, world_size, planted)
            _cut(device, mount)
            violations = faults.violations(mount / "run", faults.acknowledged(output, step), step + 1)
            step += 2
            if violations:
                wrong[f"rank {rank}, {call}-{number}"] = violations
                shutil.rmtree(mount / "run")
                faults.start(mount / "run")
                step = 2
    return wrong


def _save(root: Path, step: int, strace: tuple[str, ...], victim: int, world_size: int, planted: str) -> str:
    """Saves on all ranks until `victim` dies or is done; the other one soon follows, as the power goes for all."""
    ranks = []
    for rank in range(world_size):
        position = [f"{rank}/{world_size}/{TIMEOUT_S}"]
        # Followers have their bug alone: a rank 0 with it would be found out by itself.
        bug = [planted] if planted and rank == world_size - 1 else []
        argv = faults.command(root, step, *position, *bug, strace=strace if rank == victim else ())
        ranks.append(subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    ranks[victim].wait(TIMEOUT_S)
    if world_size > 1:
        with suppress(subprocess.TimeoutExpired):
            ranks[1 - victim].wait(STAGGER_S)
    for rank in ranks:
        rank.kill()
    return "".join(rank.communicate()[0] for rank in ranks)


@contextmanager
def _disk(scratch: Path, kind: str) -> Iterator[tuple[str, Path]]:
    """A new file system on a loop device of its own, mounted; (device, mount)."""
    image, mount = scratch / f"{kind}.img", scratch / kind
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZES[kind])
    _run(f"mkfs.{kind}", "-q", str(image))
    device = _run("losetup", "--find", "--show", str(image)).strip()
    try:
        _run("mount", device, str(mount))
        try:
            yield device, mount
        finally:
            _run("umount", str(mount))
    finally:
        _run("losetup", "--detach", device)


def _cut(device: str, mount: Path) -> None:
    """Stops the file system without writing anything back, and mounts what is on the disk."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(fd)
    _run("umount", str(mount))
    _run("mount", device, str(mount))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


if __name__ == "__main__":
    plan = json.load(sys.stdin)
    targets = [(rank, call, number) for rank, call, number in plan["targets"]]
    print(json.dumps(_attack(sys.argv[1], Path(sys.argv[2]), targets, plan["world_size"], plan["planted"])))

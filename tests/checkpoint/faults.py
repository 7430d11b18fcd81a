"""Faults at the system calls of one save, injected by strace; and disks that lose power."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint import driver

ROOT = Path(__file__).parents[2]
CHANGING = ("mkdir", "writev", "pwrite64", "ftruncate", "flock", "fsync", "rename", "unlinkat", "rmdir")
"""System calls that change a file system, or wait for it; beside these, openat with O_CREAT."""
FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
TIMEOUT_S = 30


@dataclass(frozen=True)
class Point:
    """The n-th call of one kind, counted from the start of the process."""

    call: str
    number: int
    creates: bool

    @property
    def changes(self) -> bool:
        return self.call in CHANGING or self.creates

    def __str__(self) -> str:
        return f"{self.call}-{self.number}"


def start(root: Path) -> None:
    """Two good checkpoints, so that the next save also deletes one."""
    driver.save(root, 1)
    driver.save(root, 2)


def save(root: Path, step: int, *strace: str, faults: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Saves one step in a new process, under strace when there are arguments for it."""
    command = [sys.executable, "-B", "-m", "tests.checkpoint.driver", str(root), str(step), *faults]
    if strace:
        command = ["strace", "-qq", *strace, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)


def points(scratch: Path) -> list[Point]:
    """Returns every system call of interest of one save, from taking the lock on, in their order."""
    start(scratch / "dry")
    log = scratch / "strace.log"
    wanted = ",".join((*CHANGING, "openat", "close"))
    for _ in range(2):  # the first run may still fill caches of the interpreter
        result = save(scratch / "dry", 3, "-o", str(log), "-e", f"trace={wanted}")
        assert result.stdout == "ACK 3\n", result.stderr
        shutil.rmtree(scratch / "dry")
        start(scratch / "dry")
    counts: Counter[str] = Counter()
    found: list[Point] = []
    locked = False
    for line in log.read_text().splitlines():
        match = re.match(r"(\w+)\(", line)
        if match is None:
            continue
        counts[match[1]] += 1
        locked = locked or f'"{scratch}/dry/.lock"' in line
        if locked:
            found.append(Point(match[1], counts[match[1]], "O_CREAT" in line))
        if line.startswith("rmdir(") and "/.del-" in line:
            break
    return found


def acknowledged(result: subprocess.CompletedProcess[str], before: int) -> int:
    """Returns the newest step that was acknowledged."""
    return max([before, *map(int, re.findall(r"^ACK (\d+)$", result.stdout, re.MULTILINE))])


def violations(root: Path, acked: int, latest: int) -> list[str]:
    """Returns what is wrong after a fault: an acknowledged step lost or mixed, or the next save failing."""
    found = []
    try:
        newest = driver.newest_good(root)
        if not acked <= newest <= latest:
            found.append(f"step {acked} was acknowledged, the newest good one is {newest}")
        driver.save(root, latest + 1)
        if driver.newest_good(root) != latest + 1:
            found.append("the next save is not the newest good one")
        left = {path.name for path in root.iterdir()} - {".lock"}
        if any(name.startswith(".") for name in left):
            found.append(f"leftovers: {sorted(left)}")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return found


@contextmanager
def disk(scratch: Path, kind: str) -> Iterator[Path]:
    """A new file system in a file, mounted."""
    image, mount = scratch / f"{kind}.img", scratch / kind
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20 if kind == "xfs" else 64 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True, timeout=TIMEOUT_S)
    _mount(image, mount)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=TIMEOUT_S)


def cut_power(mount: Path) -> None:
    """Stops the file system without writing anything back, and mounts what is on the disk."""
    fd = os.open(mount, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    finally:
        os.close(fd)
    subprocess.run(["umount", str(mount)], check=True, timeout=TIMEOUT_S)
    _mount(mount.with_suffix(".img"), mount)


def _mount(image: Path, mount: Path) -> None:
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True, capture_output=True, timeout=TIMEOUT_S)


def missing_for_power_cuts(kind: str) -> str:
    """Returns what this machine lacks for losing the power of a disk; empty when it lacks nothing."""
    if os.geteuid() != 0:
        return "needs root, to mount"
    for tool in ("strace", f"mkfs.{kind}", "mount"):
        if shutil.which(tool) is None:
            return f"needs {tool} (Debian: strace, xfsprogs, e2fsprogs, mount)"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices"
    return ""

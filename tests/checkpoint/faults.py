"""Faults at the system calls of one save, injected by strace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint import driver

ROOT = Path(__file__).parents[2]
CHANGING = ("mkdir", "writev", "pwrite64", "ftruncate", "flock", "fsync", "rename", "unlink", "unlinkat", "rmdir")
"""System calls that change a file system, or wait for it; beside these, openat with O_CREAT."""
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
    return subprocess.run(
        command(root, step, *faults, strace=strace), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def command(root: Path, step: int, *arguments: str, strace: tuple[str, ...] = ()) -> list[str]:
    """Returns what saves one step, under strace when there are arguments for it."""
    driven = [sys.executable, "-B", "-m", "tests.checkpoint.driver", str(root), str(step), *arguments]
    return ["strace", "-qq", *strace, *driven] if strace else driven


def killing(call: str, number: int) -> tuple[str, ...]:
    """Returns strace's arguments that end the process in the place of its n-th call of one kind."""
    return "-o", "/dev/null", "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}"


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
    collected: list[Point] = []
    locked = False
    for line in log.read_text().splitlines():
        match = re.match(r"(\w+)\(", line)
        if match is None:
            continue
        counts[match[1]] += 1
        locked = locked or f'"{scratch}/dry/.lock"' in line
        if locked:
            collected.append(Point(match[1], counts[match[1]], "O_CREAT" in line))
        if line.startswith("rmdir(") and "/.del-" in line:
            break
    return collected


def acknowledged(output: str, before: int) -> int:
    """Returns the newest step that was acknowledged."""
    return max([before, *map(int, re.findall(r"^ACK (\d+)$", output, re.MULTILINE))])


def violations(root: Path, acked: int, latest: int) -> list[str]:
    """Returns what is wrong after a fault: an acknowledged step lost or mixed, or the next save failing."""
    collected = []
    try:
        newest = driver.newest_good(root)
        if not acked <= newest <= latest:
            collected.append(f"step {acked} was acknowledged, the newest good one is {newest}")
        driver.save(root, latest + 1)
        if driver.newest_good(root) != latest + 1:
            collected.append("the next save is not the newest good one")
        left = {path.name for path in root.iterdir()} - {".lock"}
        if any(name.startswith(".") for name in left):
            collected.append(f"leftovers: {sorted(left)}")
    except Exception as error:
        collected.append(f"{type(error).__name__}: {error}")
    return collected

"""Control groups of the kernel for tests that limit what processes may use."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def control_group(controller: str, v1: Mapping[str, str], v2: Mapping[str, str]) -> Iterator[Path]:
    """Makes a group with these limits, by file name; a process joins by writing its id to `cgroup.procs`.

    It is removed once all its processes have ended. The test is skipped where none can be made.
    """
    old = Path("/sys/fs/cgroup") / controller
    root, limits = (old, v1) if old.is_dir() else (old.parent, v2)
    group = root / f"distopt-test-{os.getpid()}"
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / name).write_text(value)
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group with a limit of {controller} can be made here: {error}")
    try:
        yield group
    finally:
        deadline = time.monotonic() + 20
        while (group / "cgroup.procs").read_text():
            assert time.monotonic() < deadline, "processes of the test's control group still run"
            time.sleep(0.05)
        group.rmdir()

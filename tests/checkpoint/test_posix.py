"""A directory as a storage: links, permissions, and files that are written and read in pieces."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distopt.checkpoint import CheckpointError
from tests.checkpoint.faults import ROOT
from tests.checkpoint.runs import checkpointer


def test_directory_behind_a_link_is_the_same_directory(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with checkpointer(tmp_path / "link") as keeper:
        keeper.save(1)
        with pytest.raises(CheckpointError, match="another job writes its checkpoints here"):
            checkpointer(tmp_path / "real")
    with checkpointer(tmp_path / "real") as keeper:
        assert keeper.restore().step == 1


def test_directory_without_permission_is_refused_for_an_ordinary_user(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if "pytest" in parent.name:
            parent.chmod(0o755)
    script = (
        "import os, sys; from pathlib import Path; from distopt.checkpoint.storage.posix import PosixStorage\n"
        "os.setuid(65534)\ntry: PosixStorage(Path(sys.argv[1])).lock().__enter__()\n"
        "except PermissionError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(closed)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert f"Permission denied: '{closed}" in done.stdout, done.stderr

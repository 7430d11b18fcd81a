"""One process at a time has a run directory, with the plan's files and record in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.launch.plan import Command, Plan
from distopt.launch.run_dir import RunDirectoryError, ask_to_stop, claim, record, submission, write
from tests.small_disks import fill, small_disk


def plan(folder: Path) -> Plan:
    files = {folder / "a/config.yaml": "seed: 1\n", folder / "ssh/ssh": "#!/bin/sh\n"}
    return Plan("torchrun", (Command(("true",)),), files)


def test_files_and_record_are_there_while_the_block_runs_and_what_an_earlier_run_left_is_gone(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    for stale in ("stop", "logs/failure.txt"):
        (run_dir / stale).touch()
    with submission(plan(run_dir), run_dir):
        assert (run_dir / "a/config.yaml").read_text() == "seed: 1\n"
        assert os.access(run_dir / "ssh/ssh", os.X_OK) and not os.access(run_dir / "a/config.yaml", os.X_OK)
        assert not (run_dir / "stop").exists() and not (run_dir / "logs/failure.txt").exists()
        assert (run_dir / "launch.json").exists()


def test_stop_file_can_be_made_on_a_full_disk(tmp_path):
    with small_disk(tmp_path / "disk", 64) as folder:
        with submission(plan(folder), folder):
            fill(folder)
            ask_to_stop(folder)
        assert (folder / "stop").exists()
        ask_to_stop(folder)  # which is what a launcher does at its end, too


def test_logs_that_belong_to_another_user_are_refused(tmp_path, monkeypatch):
    log = tmp_path / "logs/rank-0.log"
    log.parent.mkdir()
    log.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != log)  # root may write to any
    with pytest.raises(RunDirectoryError, match="rank-0.log cannot be written to: Permission denied; choose another"):
        claim(tmp_path)


def test_second_process_is_refused_and_names_the_first(tmp_path):
    with submission(plan(tmp_path), tmp_path):
        for attempt in (lambda: claim(tmp_path), submission(plan(tmp_path), tmp_path).__enter__):
            message = rf"is in use by process {os.getpid()} on {socket.gethostname()}; wait for it, `distopt stop "
            with pytest.raises(RunDirectoryError, match=message):
                attempt()
    claim(tmp_path)


def test_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from distopt.launch.run_dir import _locked\n"
        "lock = _locked(Path(sys.argv[1])); print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-9, "held\n"), done.stderr
    claim(tmp_path)


def test_directory_that_cannot_be_written_is_an_error_with_the_cause(tmp_path):
    (tmp_path / "file").touch()
    for run_dir in ("file", "file/run", "file/run/below"):
        with pytest.raises(RunDirectoryError, match="run_dir: .*/file is a file; move it away, or choose another"):
            claim(tmp_path / run_dir)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("logs", "file"),
        ("launch.lock", "folder"),
        ("launch.json", "folder"),
        ("a", "file"),
        ("a/config.yaml", "folder"),
    ],
)
def test_file_where_a_folder_is_needed_or_the_reverse_is_named(name, kind, tmp_path):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch() if kind == "file" else path.mkdir()
    with pytest.raises(RunDirectoryError, match=f"run_dir: {path} is a {kind}; move it away"):
        with submission(plan(tmp_path / "run"), tmp_path / "run"):
            pass


def test_reader_of_a_file_sees_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "folder/file"
    write(path, "old")
    with path.open() as reader:
        write(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_link_that_somebody_has_put_there_is_not_followed(tmp_path):
    path = tmp_path / "file"
    (tmp_path / "precious").write_text("kept")
    path.symlink_to(tmp_path / "precious")
    write(path, "new")
    assert (tmp_path / "precious").read_text() == "kept" and not path.is_symlink()


def test_record_says_what_was_submitted_and_what_became_of_it(tmp_path):
    record(tmp_path, plan(tmp_path), status=1)
    entry = json.loads((tmp_path / "launch.json").read_text())
    assert (entry["platform"], entry["pid"], entry["status"]) == ("torchrun", os.getpid(), 1)
    assert entry["directory"] == os.getcwd() and entry["plan"]["commands"] == ["true"]

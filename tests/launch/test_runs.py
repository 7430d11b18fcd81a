"""Runs that are started and left, found again by name, asked, read and stopped."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from distopt.launch import runs
from distopt.launch.cli import app
from distopt.launch.jobs import JobError, State
from tests.launch.launching import wait_until, write_config

SINGLE = ("reduce.backend=single", "launch.workers=1")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def distopt(tmp_path, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Gives a command in the test's folder and returns its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, args)
        return result.exit_code, result.stdout, result.stderr

    return command


def test_detached_run_is_asked_about_read_and_stopped_by_its_name(start, tmp_path, distopt):
    write_config(tmp_path, "wait")
    first = start("--detach", *SINGLE)
    assert first.wait() == 0
    wait_until(lambda: (tmp_path / "ready-0-0").exists(), "the worker ready")
    status, out, _ = distopt("status")
    assert (status, out.startswith("runs/run\trunning\tprocess ")) == (0, True)
    assert distopt("logs", "run")[1].endswith("rank 0 does wait\n")
    assert distopt("logs", "run", "--rank", "1") == (2, "", "--rank: found 1, but the run has 0 to 0\n")
    assert distopt("config", "diff", "run.yaml", "run", *SINGLE, "seed=7")[:2] == (1, "seed: 1 there, 7 now\n")
    for detached in ([], ["--detach"]):
        status, _, message = distopt("launch", "run.yaml", *SINGLE, "script_args=[show, x]", *detached)
        in_use = r"run.yaml: run_dir: runs/run is in use by process \d+ on .*; wait for it, .*\n"
        assert (status, bool(re.fullmatch(in_use, message))) == (2, True), message
    for _ in range(2):  # the second time there is nothing to stop
        assert distopt("stop", "run") == (0, "stopped\texit status 143\n", "")
    assert distopt("status", "run")[1] == "runs/run\tstopped\texit status 143\n"
    assert distopt("logs", "run", "--follow")[1].endswith("rank 0 does wait\n")
    assert (tmp_path / "saved-0").exists()
    assert "distopt: stopped" in (first.run_dir / "logs" / "detached.log").read_text()


def test_run_whose_launcher_was_killed_is_told_as_such_and_can_be_launched_again(start, tmp_path, distopt):
    write_config(tmp_path, "wait")
    run = start(*SINGLE)
    wait_until(lambda: (tmp_path / "ready-0-0").exists(), "the worker ready")
    run.signal(signal.SIGKILL)
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)
    for command in ("status", "stop"):
        status, out, _ = distopt(command, "run")
        assert status == 0
        assert re.search(r"failed\t`distopt launch`, process \d+ on .*, was killed\n", out), out
    assert start(*SINGLE, "script_args=[show, x]").wait() == 0
    assert distopt("status", "run")[1] == "runs/run\tdone\texit status 0\n"


def test_run_that_cannot_be_stopped_keeps_no_other_from_it(tmp_path, monkeypatch):
    class Stopped:
        def __init__(self, directory):
            self.directory = directory

        def state(self):
            return State("running")

        def stop(self):
            if self.directory.name == "first":
                raise JobError("forgotten")
            waited.append(self.directory.name)

    waited: list[str] = []
    monkeypatch.setattr(runs, "job_of", Stopped)
    monkeypatch.setattr(runs, "_wait_until_stopped", lambda job, directory, was_known: waited.append("end"))
    with pytest.raises(JobError, match="forgotten"):
        runs.stop_all([tmp_path / "first", tmp_path / "second"])
    assert waited == ["second", "end"]


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_run_that_was_never_launched_is_refused_with_those_that_were(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "launch.json").write_text("{}")
    (tmp_path / "run.yaml").write_text("name: run\ntask: mytasks.house:House\n")
    unknown = CliRunner().invoke(app, [command, "nosuch"])
    assert (unknown.exit_code, "Known in runs: one, two." in unknown.output) == (2, True)
    assert "named by its directory or its name" in CliRunner().invoke(app, [command, "run.yaml"]).output


def test_status_without_any_run_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["status"])
    assert (result.exit_code, "no run was launched from this folder" in result.stderr) == (0, True)

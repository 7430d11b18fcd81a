"""A platform of the user's: one class in one file outside the package, named in the YAML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distopt.config import ConfigError, all_keys, parse_config
from distopt.launch.cli import app
from distopt.launch.jobs import FollowedJob, State
from distopt.launch.platforms import PLATFORMS, Platform, load_platform
from tests.launch.launching import wait_until, write_config

SUM = Path(__file__).with_name("sum_script.py")

# Both classes as a user would write them, in a file that knows nothing of the tests.
USERS_PLATFORMS = '''
"""Workers that meet at a port of this machine: below `distopt launch`, or left in the background."""

import os
import signal
import subprocess
import sys

from distopt.launch.findings import Finding
from distopt.launch.jobs import State, SubmittedJob
from distopt.launch.plan import Command, Plan, env_of_workers, run_files, worker_argv
from distopt.launch.platforms import Platform


class Loopback(Platform):
    def check(self, config):
        if config.launch.port is None:
            yield Finding("launch.port", "missing", "name a free one")

    def plan(self, config):
        return Plan("loopback", tuple(self.command(config, rank) for rank in self.ranks(config)), run_files(config))

    def command(self, config, rank):
        world = {"WORLD_SIZE": str(config.launch.workers), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(config.launch.port)}
        return Command(tuple(worker_argv(config, sys.executable)), env_of_workers(config, **world, **meeting))


class Background(Loopback):
    def job(self, config):
        return BackgroundJob(config.run_dir, self.plan(config))


class BackgroundJob(SubmittedJob):
    """A shell in a session of its own that starts the workers, passes SIGTERM to them, and waits for all."""

    launcher_log = "shell.log"

    def __init__(self, run_dir, plan):
        self.logs_dir = run_dir / "logs"
        self.pid_file = run_dir / "pid"
        self.workers = [str(command) for command in plan.commands]

    def submit(self):
        script = "\\n".join(["trap : TERM", *(f"env {worker} &" for worker in self.workers), "wait; wait"])
        with (self.logs_dir / self.launcher_log).open("w") as log:
            shell = subprocess.Popen(["sh", "-c", script], start_new_session=True, stdout=log, stderr=log)
        self.pid_file.write_text(str(shell.pid))
        return f"process group {shell.pid}"

    def state(self):
        if not self.pid_file.exists():
            return State("unknown")
        return State("running", f"process group {self.pid}") if self.is_running() else State("done")

    @property
    def pid(self):
        return int(self.pid_file.read_text())

    def is_running(self):
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def logs(self, rank):
        path = self.logs_dir / f"rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    def stop(self):
        if self.is_running():
            os.killpg(self.pid, signal.SIGTERM)
'''


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Writes a module into the current folder and returns its name; each test has another, as modules are kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def written(text: str) -> str:
        name = f"users_platforms_{abs(hash(tmp_path))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return written


@pytest.fixture
def port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize("name", PLATFORMS)
def test_each_name_of_the_yaml_is_a_platform(name):
    assert isinstance(load_platform(name), Platform)
    assert parse_config("name: run\nscript: x.py", [f"launch.platform={name}"]).launch.platform == name


def test_users_platform_starts_a_run_that_ends_well(module, port, start, tmp_path):
    write_config(tmp_path)
    name = module(USERS_PLATFORMS)
    run = start(f"script={SUM}", "script_args=['0']", f"launch.platform={name}:Loopback", f"launch.port={port}")
    assert run.wait() == 0, run.everything()
    sums = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["total"] for one in sums] == [2, 2]
    assert json.loads((run.run_dir / "launch.json").read_text())["platform"] == "loopback"


def test_users_platform_is_asked_for_its_findings_and_its_plan(module, port, tmp_path):
    write_config(tmp_path)
    platform = f"launch.platform={module(USERS_PLATFORMS)}:Loopback"
    refused = CliRunner().invoke(app, ["launch", "run.yaml", platform])
    assert (refused.exit_code, refused.output) == (2, "run.yaml: launch.port: missing; name a free one\n")
    shown = CliRunner().invoke(app, ["launch", "run.yaml", platform, f"launch.port={port}", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert len(re.findall(rf"^DISTOPT_\S.* MASTER_PORT={port} RANK=[01] WORLD_SIZE=2 ", shown.output, re.M)) == 2
    assert not (tmp_path / "runs").exists()


def test_users_platform_with_a_job_of_its_own_is_asked_followed_and_stopped(module, port, start, tmp_path):
    write_config(tmp_path, "wait")
    chosen = [f"launch.platform={module(USERS_PLATFORMS)}:Background", f"launch.port={port}"]
    run = start(*chosen, "--detach")
    assert run.wait() == 0, run.everything()
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    assert "submitted: process group " in run.err

    def distopt(*args: str) -> str:
        argv = [sys.executable, "-m", "distopt.launch", *args]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    assert distopt("status").startswith("runs/run\trunning\tprocess group ")
    assert "rank 1 does wait" in distopt("logs", "run", "--rank", "1")
    assert "already has a run run (running, process group" in distopt("launch", "run.yaml", *chosen)
    assert distopt("stop", "run").startswith("done\t")
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    wait_until(lambda: run.processes() == [], "all processes of the run gone")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("class Other: ...", "Other", "Other, expected a subclass of distopt.launch.platforms.Platform"),
        (USERS_PLATFORMS, "Loopbak", "has no Loopbak; did you mean Loopback?"),
        ("from distopt.launch.platforms import Platform\nclass Half(Platform):\n    def check(self, config): ...",
         "Half", "Half lacks methods that distopt.launch.platforms.Platform requires: plan"),
    ],
)  # fmt: skip
def test_class_that_is_no_platform_is_refused(text, name, message, module, tmp_path):
    write_config(tmp_path)
    done = CliRunner().invoke(app, ["launch", "run.yaml", f"launch.platform={module(text)}:{name}"])
    assert done.exit_code == 2
    assert done.output.startswith("run.yaml: launch.platform: ") and message in done.output


PLATFORM = """
from distopt.launch.findings import Finding
from distopt.launch.plan import Command, Plan, run_files
from distopt.launch.platforms import Platform

class Mine(Platform):
    def check(self, config): return []
    def plan(self, config): return Plan("mine", (Command(("no-such-program",)),), run_files(config))
"""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("return []", "return config.prot", r"check failed at \S+\.py:7: AttributeError: .* has no attribute 'prot'"),
        (
            "return []",
            "return None",
            r"check\(\) of \S+ returned None, expected an iterable of distopt.launch.findings.Finding",
        ),
        ("return []", "yield 'no port'", r"check\(\) of \S+ returned 'no port', expected an iterable of"),
        ("return Plan", "return Plann", r"plan failed at \S+\.py:8: NameError: name 'Plann' is not defined"),
        ("return Plan", "Plan", r"plan\(\) of \S+ returned None, expected a distopt.launch.plan.Plan"),
        (
            "def check(self, config)",
            "def check(self)",
            r"check failed at \S+: TypeError: Mine.check\(\) takes 1 positional argument",
        ),
        ("class Mine", "1 / 0\nclass Mine", r"loading it failed at \S+\.py:6: ZeroDivisionError: division by zero"),
        ("class Mine", "class Mine(:", r"loading it failed at \S+\.py:6: SyntaxError: invalid syntax"),
        (
            "def plan",
            "def __init__(self, x): ...\n    def plan",
            r"loading it failed at \S+: TypeError: .* argument: 'x'",
        ),
    ],
)
def test_mistake_in_a_users_platform_is_one_line_with_its_place(right, wrong, message, module, tmp_path):
    write_config(tmp_path)
    name = module(PLATFORM.replace(right, wrong))
    done = CliRunner().invoke(app, ["launch", "run.yaml", f"launch.platform={name}:Mine"])
    assert done.exit_code == 2, done.output
    assert re.fullmatch(rf"run\.yaml: launch\.platform: .*{message}.*\n", done.output), done.output
    assert not (tmp_path / "runs").exists()


def test_program_of_a_plan_that_is_not_there_is_named(module, start, tmp_path):
    write_config(tmp_path)
    run = start(f"launch.platform={module(PLATFORM)}:Mine")
    assert run.wait() == 2
    expected = "no-such-program cannot be started: No such file or directory; check that it is installed and on PATH"
    assert run.err == f"distopt: starting 2 workers (mine)\nrun.yaml: {expected}\n"
    assert FollowedJob(run.run_dir).state() == State("failed", "exit status 2")


def test_every_key_of_launch_is_in_the_table_of_the_docs_and_no_other():
    page = (Path(__file__).parents[2] / "docs/platforms.md").read_text().partition("## Every key")[2]
    rows = re.findall(r"^\| `([a-z_.]*[a-z_])` \|(.*)\|$", page, re.MULTILINE)
    keys = [key.name for key in all_keys() if not key.is_section and key.name.startswith("launch.")]
    assert [f"launch.{key}" for key, _ in rows] == [re.sub(r"\[\]|\.\*", "", key) for key in keys]
    ways = {cell.strip() for _, cells in rows for cell in cells.split("|")}
    assert ways <= {"run", "files", "unit", "refused", "-"}
    assert {cells.count("|") for _, cells in rows} == {len(PLATFORMS) - 1}


@pytest.mark.parametrize("platform", ["elsewhere:Fleet", "os:Fleet", "slurmm"])
def test_platform_that_is_not_trusted_or_not_known_is_never_imported(platform, monkeypatch):
    monkeypatch.setenv("DISTOPT_TRUSTED_TASKS", "distopt,mine")
    with pytest.raises(ConfigError) as refused:
        parse_config("name: run\ntask: mine.house:House", [f"launch.platform={platform}"])
    (problem,) = refused.value.problems
    expected = {
        "elsewhere:Fleet": "found elsewhere:Fleet, but your DISTOPT_TRUSTED_TASKS allows only code of distopt, mine; ",
        "os:Fleet": "found os:Fleet, but os belongs to Python's standard library; ",
        "slurmm": "expected one of local, torchrun, horovodrun, mpirun, slurm, kubernetes or module:Name of your own",
    }
    assert problem.startswith("command line: launch.platform: ") and expected[platform] in problem

"""What each platform would do, held against golden files, and how it is printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from distopt.config import load_config, parse_config
from distopt.config.values import SECRET_NAME
from distopt.launch.cli import app
from distopt.launch.plan import Command, Plan
from distopt.launch.platforms import horovodrun, load_platform, mpirun
from distopt.launch.platforms.kubernetes import platform as kubernetes
from distopt.launch.run_dir import write_plan

BASE = "name: flights\ntask: distopt.examples.flights:Flights\ndata: {global_batch: 4096}\n"
# Addresses that documentation may use (RFC 5737), so that no host here has one and no name is looked up.
HOSTS = "launch.hosts=[203.0.113.1,203.0.113.2]"
PLANS = {
    "local": ["launch.workers=2"],
    "local-single": ["reduce.backend=single"],
    "local-horovod": ["reduce.backend=horovod", "launch.workers=2", "launch.secrets=[HUB_TOKEN]"],
    "torchrun": ["launch.platform=torchrun", "launch.workers=2", "launch.port=29400"],
    "horovodrun": ["launch.platform=horovodrun", "launch.workers=2"],
    "mpirun": ["launch.platform=mpirun", "launch.workers=2"],
    "torchrun-hosts": ["launch.platform=torchrun", HOSTS, "launch.workers=2"],
    "torchrun-elastic": ["launch.platform=torchrun", HOSTS, "launch.min_hosts=1"],
    "horovodrun-hosts": ["launch.platform=horovodrun", HOSTS, "launch.workers=2"],
    "horovodrun-mpi": ["launch.platform=horovodrun", HOSTS, "launch.workers=2", "launch.horovod_controller=mpi"],
    "horovodrun-elastic": ["launch.platform=horovodrun", HOSTS, "launch.min_hosts=1"],
    "mpirun-hosts": ["launch.platform=mpirun", HOSTS, "launch.workers=2"],
    "mpirun-mpich": ["launch.platform=mpirun", HOSTS, "launch.workers=2"],
}
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=200)


@pytest.mark.parametrize("name", PLANS)
def test_plan_is_the_golden_one(name, golden, monkeypatch):
    for secret in filter(SECRET_NAME.search, list(os.environ)):
        monkeypatch.delenv(secret)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(mpirun, "is_mpich", lambda program: name.endswith("mpich"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    config = parse_config(BASE, PLANS[name])
    plan = load_platform(config.launch.platform).plan(config)
    # Without the configuration, which every new key of any section would change.
    plan = replace(plan, files={path: text for path, text in plan.files.items() if path.name != "config.yaml"})
    golden(f"{name}.txt", str(plan))


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("name: run\nscript: run.yaml.py\n")
    (tmp_path / "run.yaml.py").write_text("")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["launch", "run.yaml", "--dry-run", "launch.workers=2"])
    assert result.exit_code == 0
    assert "cat > runs/run/config.yaml <<'END'" in result.output
    assert "--nproc-per-node=2" in result.output
    assert sorted(tmp_path.rglob("*")) == before


LACKING = {
    "slurm": ["launch.platform=slurm"],
    "kubernetes": ["launch.platform=kubernetes", "run_dir=/runs/run",
                   "launch.kubernetes={image: i, volumes: [{claim: runs, path: /runs}]}"],
    "horovodrun": ["launch.platform=horovodrun", "launch.horovod_controller=mpi"],
    "mpirun": ["launch.platform=mpirun", "reduce.backend=mpi"],
    "torchrun": ["launch.platform=torchrun", "launch.hosts=[nosuch.invalid,127.0.1.1]"],
    "local": ["launch.workers=999", "launch.secrets=[NOT_SET]", "run_dir=/proc/run"],
}  # fmt: skip


@pytest.mark.parametrize("platform", LACKING)
def test_dry_run_needs_nothing_of_the_platform_and_warns_of_what_a_start_would_refuse(platform, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    for module in (horovodrun, mpirun, kubernetes):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    for module in (horovodrun, mpirun):
        monkeypatch.setattr(module, "find_mpirun", lambda: None)
    (tmp_path / "run.yaml").write_text("name: run\nscript: train.py\n")
    (tmp_path / "train.py").touch()
    (tmp_path / "train.py").write_text("")
    argv = ["launch", "run.yaml", *LACKING[platform]]

    refused = CliRunner().invoke(app, argv)
    shown = CliRunner().invoke(app, [*argv, "--dry-run"])
    assert (refused.exit_code, shown.exit_code) == (2, 0), shown.output
    reasons = [line.removeprefix("run.yaml: ") for line in refused.stderr.splitlines()]
    assert reasons and shown.stderr.splitlines() == [f"run.yaml: warning: {reason}" for reason in reasons]
    assert shown.stdout


def test_files_of_a_dry_run_are_written_where_that_is_wanted_and_the_script_starts_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("name: run\nscript: train.py\nreduce: {backend: single}\n")
    (tmp_path / "train.py").write_text("print('trained')")
    shown = CliRunner().invoke(app, ["launch", "run.yaml", "--dry-run", "--output", "a plan"])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines() == ["a plan/config.yaml", "a plan/start.sh"]
    assert not (tmp_path / "runs").exists()
    subprocess.run(["a plan/start.sh"], check=True, timeout=60, capture_output=True)
    assert (tmp_path / "runs/run/config.yaml").read_text() == (tmp_path / "a plan/config.yaml").read_text()
    assert "trained" in (tmp_path / "runs/run/logs/rank-0.log").read_text()


def test_script_for_several_hosts_gives_the_run_to_distopt_launch_whose_heartbeat_the_agents_need(tmp_path):
    config = parse_config(BASE, ["launch.platform=torchrun", HOSTS])
    folder = tmp_path / "a plan"
    plan = load_platform("torchrun").plan(config)
    *_, script = write_plan(plan, folder, config.run_dir)
    command = script.read_text().splitlines()[1]
    assert shlex.split(command)[-4:] == ["distopt.launch", "launch", "--", str(folder / "config.yaml")]
    assert load_config(folder / "config.yaml") == config


@pytest.mark.parametrize("name", ["config.yaml", "start.sh"])
def test_output_replaces_its_own_files_and_no_file_of_the_users(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("name: run\nscript: train.py\n")
    (tmp_path / "train.py").touch()
    command = ["launch", "run.yaml", "--dry-run", "--output"]
    (tmp_path / name).write_text("# mine\n")
    refused = CliRunner().invoke(app, [*command, "."])
    assert refused.exit_code == 2
    assert f"--output: {name} cannot be written: it is there" in refused.output
    assert (tmp_path / name).read_text() == "# mine\n"
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, "run.yaml", "train.py"])

    for _ in range(2):
        assert CliRunner().invoke(app, [*command, "plan"]).exit_code == 0
    (tmp_path / "plan" / name).unlink()
    assert CliRunner().invoke(app, [*command, "plan"]).exit_code == 0


def test_output_of_a_run_that_starts_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("name: run\nscript: train.py\n")
    (tmp_path / "train.py").touch()
    done = CliRunner().invoke(app, ["launch", str(tmp_path / "run.yaml"), "--output", "x"])
    assert (done.exit_code, "--output: found without --dry-run" in done.output) == (2, True)


@given(st.lists(TEXT, max_size=5), st.dictionaries(st.from_regex(r"\A[A-Z_]{1,8}\Z"), TEXT, max_size=3))
def test_printed_command_is_read_by_a_shell_as_the_same_words(argv, env):
    tokens = shlex.split(str(Command(("prog", *argv), env)))
    assert tokens == [*(f"{key}={value}" for key, value in sorted(env.items())), "prog", *argv]


@pytest.mark.parametrize("text", ["", "plain\n", "END\n", "END\nEND_\n$HOME `id` \\ '\n"])
def test_printed_files_are_written_by_a_shell_as_they_are(text, tmp_path):
    path = tmp_path / "a file"
    plan = Plan("local", (Command((sys.executable, "-c", "print('ran')")),), {path: text})
    done = subprocess.run(["sh", "-c", str(plan)], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, path.read_text()) == ("ran\n", "", text)

"""The command line: quick, and free of torch until a worker needs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from typer.testing import CliRunner

from distopt.launch.cli import app
from tests.conftest import HANDLED_SIGNALS

RUN = [sys.executable, "-X", "importtime", "-m", "distopt.launch"]


def test_launcher_imports_neither_torch_nor_pyro_nor_the_config_for_its_help():
    done = subprocess.run([*RUN, "launch", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "pyro", "numpy", "omegaconf", "yaml", "pydantic", "rich", "distopt.config"}


@pytest.mark.parametrize(("typed", "completed"), [("distopt la", "launch"), ("distopt config sc", "schema")])
def test_shell_completes_commands(typed, completed):
    variables = {"_DISTOPT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", "import sys; sys.argv = ['distopt']; from distopt.launch.cli import main; main()"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [completed], done.stderr


def test_dry_run_imports_neither_torch_nor_pyro(tmp_path):
    (tmp_path / "run.yaml").write_text("name: run\nscript: train.py\n")
    (tmp_path / "train.py").write_text("")
    done = subprocess.run(
        [*RUN, "launch", "run.yaml", "--dry-run"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "pyro", "numpy", "horovod", "omegaconf"}


def test_train_refuses_a_bad_config_before_it_imports_torch(tmp_path):
    (tmp_path / "run.yaml").write_text("name: run\n")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2
    assert "found neither of task and script" in result.output


def test_config_that_is_shown_is_complete_and_keeps_to_the_schema_that_is_printed(tmp_path):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed (make setup-dev)")
    (tmp_path / "run.yaml").write_text("name: run\nscript: train.py\nrun_dir: /data/${name}\n")
    shown = CliRunner().invoke(app, ["config", "show", str(tmp_path / "run.yaml"), "launch.workers=3"])
    schema = CliRunner().invoke(app, ["config", "schema"])
    assert (shown.exit_code, schema.exit_code) == (0, 0)
    raw = yaml.safe_load(shown.stdout)
    assert (raw["run_dir"], raw["launch"]["workers"], raw["train"]["num_steps"]) == ("/data/run", 3, 1000)
    validator = jsonschema.Draft202012Validator(json.loads(schema.stdout))
    validator.validate(raw)
    with pytest.raises(jsonschema.ValidationError, match="nodez"):
        validator.validate({**raw, "launch": {"nodez": 2}})


@pytest.fixture
def after_training() -> Iterator[None]:
    """Heeds signals again after `distopt train` in this process, which ignores them since it is about to end."""
    handlers = {number: signal.getsignal(number) for number in HANDLED_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("after_training")
def test_train_and_doctor_find_a_task_beside_the_config_where_no_launcher_has_started_them(tmp_path, monkeypatch):
    (tmp_path / "task_beside.py").write_text("")
    (tmp_path / "run.yaml").write_text("name: run\ntask: task_beside:Missing\nreduce: {backend: single}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for command, status in ((["train", "run.yaml"], 1), (["doctor", "run.yaml", "--capture"], 2)):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == status
        assert "importing" not in result.output and "Missing" in result.output

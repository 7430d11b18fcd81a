"""Bad input is refused with exit status 2 before any process starts, naming what was found and the fix."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from distopt.config import dump_yaml, parse_config
from distopt.launch import checks
from distopt.launch.cli import app
from distopt.launch.platforms.slurm.platform import SlurmPlatform

TASK = "name: run\ntask: mytasks.house:House\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a package whose import would fail the test, and no way to start a process."""
    (tmp_path / "mytasks").mkdir()
    (tmp_path / "mytasks" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "mytasks" / "house.py").write_text("raise SystemExit('imported')\nclass House: ...\n")
    monkeypatch.chdir(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    return tmp_path


def refusal(folder, text: str, *args: str) -> str:
    (folder / "run.yaml").write_text(text)
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, ["launch", "run.yaml", *args])
    assert result.exit_code == 2, result.output
    assert sorted(folder.rglob("*")) == before
    return result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TASK + "sed: 1", "run.yaml: sed: unknown key. Did you mean seed?"),
        (TASK + "seed: many", "run.yaml: seed: found 'many' (str), expected an integer."),
        (TASK + "launch: {platform: slurmm}", "expected one of local"),
        ("name: ../run\nscript: x.py", "run.yaml: name: found '../run' (str)"),
        ("name: run\nscript: nosuch.py", "run.yaml: script: nosuch.py: no such file in "),
        ("name: run\ntask: nosuch.house:House", "no module 'nosuch' for "),
        ("name: run\ntask: mytasks.hose:House", "no module 'mytasks.hose' for "),
        ("name: run\ntask: mytasks.house.room:House", "mytasks.house is a module and not a package"),
        ("name: run\ntask: mytasks.house:Hose", "mytasks/house.py has no 'Hose'; did you mean mytasks.house:House?"),
        (TASK + "data: {global_batch: 2}\nlaunch: {workers: 3}",
         "data.global_batch: 2 rows cannot be shared by 3 workers, each needs at least one; set data.global_batch=3"),
        (TASK + "data: {global_batch: 100}\nlaunch: {workers: 3, oversubscribe: true}",
         "data.global_batch: 100 rows cannot be divided evenly among 3 workers; set data.global_batch=99 or 102"),
        (TASK + "launch: {workers: 9999}", "or launch.oversubscribe=true to let them share"),
        (TASK + "launch: {platform: kubernetes, workers: 4, kubernetes: {gpus: 1}}", "launch.kubernetes.gpus is 1"),
        (TASK + "launch: {platform: kubernetes}", "launch.kubernetes.image: missing"),
        ("name: a..b\nscript: x.py", "'..' is not allowed in a run's name"),
        (TASK + "reduce: {backend: single}\nlaunch: {workers: 2}", "set launch.workers=1 or reduce.backend=auto"),
        (TASK + "reduce: {backend: horovod}\nlaunch: {platform: torchrun}", "torchrun starts workers of torch_dist"),
        (TASK + "reduce: {backend: mpi}\nlaunch: {platform: horovodrun}", "horovodrun starts workers of horovod"),
        (TASK + "run_dir: mytasks/house.py/run", "run_dir: mytasks/house.py is a file"),
        (TASK + "launch: {platform: horovodrun, hosts: [localhost], min_hosts: 1}",
         "launch.min_hosts: elastic Horovod cannot survive the failure of its only host; name two"),
        (TASK + "launch: {nodes: 2}", "launch.nodes: found 2, but local does not find hosts by itself; name them in"),
        (TASK + "launch: {workers: 3, oversubscribe: true}\nserve: {port: 65534}",
         "serve.port: found 65534, but the last of 3 workers would serve at 65536; set serve.port=65533"),
        (TASK + "launch: {workers: 2, oversubscribe: true, port: 29321}\nserve: {port: 29320}",
         "serve.port: workers serve at 29320 to 29321, and launch.port is 29321; choose a serve.port"),
        (TASK + "launch: {secrets: [NOT_SET]}", "launch.secrets: NOT_SET is not set in your environment, from which"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_fix(folder, text, message):
    assert message in refusal(folder, text)


def test_more_workers_than_gpus_of_a_slurm_node_are_refused():
    asked = ["launch.platform=slurm", "launch.workers=4", "launch.slurm={gpus_per_node: 2}"]
    message = str(next(SlurmPlatform().check(parse_config(TASK, asked))))
    assert "4 on each host, but launch.slurm.gpus_per_node is 2" in message


def test_more_workers_than_cores_may_share_them_where_that_is_wanted(folder):
    (folder / "run.yaml").write_text(TASK)
    result = CliRunner().invoke(
        app, ["launch", "run.yaml", "--dry-run", "launch.workers=9999", "launch.oversubscribe=true"]
    )
    assert result.exit_code == 0, result.output


def test_config_file_that_is_missing_is_refused(folder):
    result = CliRunner().invoke(app, ["launch", "nosuch.yaml"])
    assert (result.exit_code, "nosuch.yaml: no such file" in result.output) == (2, True)


def test_script_with_a_syntax_error_is_refused_with_its_line(folder):
    (folder / "train.py").write_text("x = 1\nif x\n    pass\n")
    assert "script: train.py:2: expected ':'" in refusal(folder, "name: run\nscript: train.py")


def test_task_is_found_in_the_folder_of_the_command_without_being_imported(folder):
    assert list(checks._check_code(parse_config(TASK), None)) == []
    assert "mytasks" not in sys.modules


def test_task_of_a_module_that_makes_its_names_is_left_to_the_import(folder):
    (folder / "mytasks" / "made.py").write_text("from os.path import *\n")
    assert list(checks._check_code(parse_config("name: run\ntask: mytasks.made:Anything"), None)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {name: mytasks.house:Hose}", "optim.name: "),
        ("train: {loss: mytasks.house:Hose}", "train.loss: "),
        ("optim: {scheduler: {name: mytasks.house:Hose}}", "optim.scheduler.name: "),
        ("log: {loggers: [mytasks.house:House, mytasks.house:Hose]}", "log.loggers: "),
        ("reduce: {backend: mytasks.house:Hose}", "reduce.backend: "),
    ],
)
def test_every_key_that_names_code_is_checked_without_importing_it(folder, text, message):
    problem = refusal(folder, TASK + text)
    path = folder / "mytasks" / "house.py"
    assert problem == f"run.yaml: {message}{path} has no 'Hose'; did you mean mytasks.house:House?\n"


def test_port_in_use_is_refused(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal(folder, TASK, f"launch.port={port}")
    assert f"launch.port: {port} cannot be used on this machine: Address already in use" in message


KUBERNETES = """
launch: {platform: kubernetes, kubernetes: {image: "registry.example/mine:1", volumes: [{claim: runs, path: /runs}]}}
run_dir: /runs/run
"""


@pytest.mark.parametrize(
    ("code", "warned"),
    [
        ("task: nosuch.house:House", "no module 'nosuch'"),
        ("script: /code/train.py", "script: /code/train.py: no such file in"),
        ("task: mytasks.house:House", ""),
    ],
)
def test_code_that_may_be_in_the_image_alone_is_a_warning(code, warned, folder, monkeypatch):
    pytest.importorskip("kubernetes", reason="kubernetes is not installed (make setup-dev)")
    (folder / "run.yaml").write_text(f"name: run\n{code}\n{KUBERNETES}")
    result = CliRunner().invoke(app, ["launch", "run.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "kind: Job" in result.stdout
    assert (warned in result.stderr, "it must be in registry.example/mine:1" in result.stderr) == (True, bool(warned))


def test_code_that_is_here_is_checked_for_the_image_too(folder):
    message = refusal(folder, f"name: run\ntask: mytasks.house:Hose\n{KUBERNETES}")
    assert "mytasks/house.py has no 'Hose'; did you mean mytasks.house:House?" in message


def test_port_of_pods_may_be_in_use_here(folder):
    pytest.importorskip("kubernetes", reason="kubernetes is not installed (make setup-dev)")
    (folder / "run.yaml").write_text(f"{TASK}{KUBERNETES}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"launch.port={taken.getsockname()[1]}"
        result = CliRunner().invoke(app, ["launch", "run.yaml", "--dry-run", port])
    assert result.exit_code == 0, result.output


def test_run_directory_that_cannot_be_written_to_is_refused(folder):
    # Not even root can make a folder there, nor can access(2) tell.
    assert "run_dir: /proc/runs cannot be written to: " in refusal(folder, TASK, "run_dir=/proc/runs")


def test_run_directory_with_checkpoints_of_another_config_is_refused_with_the_differences(folder):
    (folder / "runs/run/checkpoints/step-00000010").mkdir(parents=True)
    (folder / "runs/run/checkpoints/step-00000010/manifest.json").touch()
    before = parse_config(TASK, ["train.num_particles=2", "train.num_steps=10", "seed=3", "optim.args={lr: 0.02}"])
    (folder / "runs/run/config.yaml").write_text(json.dumps(before.model_dump(mode="json")))
    message = refusal(folder, TASK + "optim: {args: {lr: 0.01}}\nseed: 3\ntrain: {num_particles: 3, num_steps: 20}")
    assert "run_dir: runs/run holds checkpoints of another configuration:" in message
    assert "train.num_particles: 2 there, 3 now" in message
    assert "choose another run_dir (run_dir=runs/run-2)" in message
    assert not any(key in message for key in ("num_steps", "seed", "optim"))


@pytest.mark.parametrize("intended", ["checkpoint.resume_only=[params]", "checkpoint.resume=never"])
def test_another_configuration_is_left_to_the_workers_where_it_is_intended(intended, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs/run/checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (tmp_path / "runs/run/config.yaml").write_text(dump_yaml(parse_config(TASK)))
    (finding,) = checks._check_recorded_config(parse_config(TASK, ["optim.name=SGD"]))
    assert "checkpoint.resume_only=[params]" in str(finding)
    assert not list(checks._check_recorded_config(parse_config(TASK, ["optim.name=SGD", intended])))


def test_run_directory_of_the_same_run_on_other_machines_is_gone_on_with(folder):
    (folder / "runs/run/checkpoints/step-00000010").mkdir(parents=True)
    (folder / "runs/run/checkpoints/step-00000010/manifest.json").touch()
    before = parse_config(TASK, ["launch.workers=4", "train.num_steps=10"])
    (folder / "runs/run/config.yaml").write_text(json.dumps(before.model_dump(mode="json")))
    (folder / "run.yaml").write_text(TASK)
    result = CliRunner().invoke(app, ["launch", "run.yaml", "--dry-run"])
    assert result.exit_code == 0, result.output


def test_folder_of_logs_is_not_taken_for_the_package_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "wandb_logs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not checks._is_installed("wandb_logs") and not checks._is_installed("nosuch_tracker")
    assert checks._is_installed("pytest")

"""Every seam as a new user meets it: a class in a file of one's own, named in a YAML, used by a real run.

The files and the YAML are the blocks of docs/plugins.md, written to an empty folder, where the run is started, so that
distopt sees them as it sees a user's.
"""

from __future__ import annotations

import csv
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.distributions import Normal
from typer.testing import CliRunner

from distopt.config import parse_config
from distopt.config.schema import CODE_KEYS
from distopt.launch.cli import app
from tests.train.runs import environment, parameters, steps_logged

DISTOPT = Path(sys.executable).parent / "distopt"
PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()
FILES = {
    name: text for name, text in re.findall(r"^```(?:python|yaml) (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
}
CONFIG: dict[str, Any] = yaml.safe_load(FILES["run.yaml"])
LR, STRIDE = CONFIG["optim"]["args"]["lr"], CONFIG["optim"]["args"]["stride"]
DROP_AT, DROP = CONFIG["optim"]["scheduler"]["args"]["at"], CONFIG["optim"]["scheduler"]["args"]["factor"]
FACTOR = CONFIG["train"]["loss_args"]["factor"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the user's files and the YAML that names them."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def launch(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [str(DISTOPT), "launch", "run.yaml", f"launch.port={port}", *overrides],
        cwd=folder,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=150,
    )


def expected_locs(num_steps: int) -> list[Tensor]:
    """`loc` before each step and after the last one, by hand.

    The x of all points are far on the positive side, so both ranks' gradients have one sign, whose mean is -1. The y of
    the two ranks pull in opposite directions from 0 with equal strength, so the mean of their signs is 0.
    """
    locs = [torch.zeros(2)]
    for step in range(num_steps):
        rate = LR * (DROP if step >= DROP_AT else 1.0)
        locs.append(locs[-1] + torch.tensor([STRIDE * rate, 0.0]))
    return locs


def logged_elbos(folder: Path) -> dict[int, float]:
    with (folder / "runs/plugins/elbo.csv").open(newline="") as file:
        return {int(step): float(elbo) for step, elbo in csv.reader(file)}


def test_classes_of_the_user_named_in_one_yaml_train_together_and_resume(folder: Path) -> None:
    points = runpy.run_path(str(folder / "my_task.py"))["Points"]().points
    for num_steps in (4, 6):
        done = launch(folder, f"train.num_steps={num_steps}")
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "2 workers over counting" in output  # the backend, on the workers that the platform has started
        assert "loc was fitted" in output

        # The hook makes gradients signs, the optimizer takes strides, the schedule halves the rate: exact in binary.
        locs = expected_locs(num_steps)
        assert parameters(folder / "runs/plugins")["loc"].tolist() == locs[-1].tolist()

        # The logger has each step once, also after the run was resumed, and the objective has its factor.
        elbos = logged_elbos(folder)
        assert list(elbos) == list(range(1, num_steps + 1)) == steps_logged(folder / "runs/plugins")
        for step, loc in enumerate(locs[:-1], start=1):
            expected = FACTOR * float(Normal(loc, 1.0).log_prob(points).sum())
            assert elbos[step] == pytest.approx(expected, rel=1e-6)
    assert "resuming from step 4" in output

    # The backend was closed on both ranks, and has carried at least one all-reduce per step.
    counts = [int((folder / f"all-reduces-of-rank-{rank}").read_text()) for rank in (0, 1)]
    assert counts[0] == counts[1] >= 2


def test_plan_of_the_users_platform_is_shown_without_starting_anything(folder: Path) -> None:
    done = launch(folder, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "RANK=0" in done.stdout and "RANK=1" in done.stdout
    assert not (folder / "runs").exists()


def test_check_of_the_users_platform_refuses_the_run(folder: Path) -> None:
    done = launch(folder, "launch.port=null")
    assert done.returncode == 2
    assert "launch.port: found null, but plain processes meet at a port; set it to a free one" in done.stderr


def test_page_has_a_file_for_every_key_that_names_code() -> None:
    references = dict(parse_config(FILES["run.yaml"]).references())
    assert set(references) == set(CODE_KEYS)
    assert {f"{name.partition(':')[0]}.py" for name in references.values()} == {*FILES} - {"run.yaml"}


@pytest.mark.parametrize("key", CODE_KEYS)
def test_no_seam_runs_code_that_the_user_does_not_trust(
    key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = dict(parse_config(FILES["run.yaml"]).references())[key]
    module = reference.partition(":")[0]
    (folder / f"{module}.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DISTOPT_TRUSTED_TASKS", ",".join({Path(name).stem for name in FILES} - {module}))

    done = CliRunner().invoke(app, ["launch", "run.yaml"])
    assert done.exit_code == 2
    where = "log.loggers.0.name" if key == "log.loggers" else key
    assert f"run.yaml: {where}: found {reference}, but your DISTOPT_TRUSTED_TASKS allows only code of" in done.output
    assert "it was imported" not in done.output

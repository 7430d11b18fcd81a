"""Every seam as a new user meets it: a class in a file of one's own, named in a YAML, used by a real run.

The files are in `tests/seams/`. They are copied to an empty folder, where the run is started, so that distopt sees them
as it sees a user's.
"""

from __future__ import annotations

import csv
import shutil
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

from tests.seams.my_task import Points
from tests.train.runs import environment, parameters, steps_logged

DISTOPT = Path(sys.executable).parent / "distopt"
SEAMS = Path(__file__).parent / "seams"
LR, STRIDE, FACTOR = 0.25, 2.0, 3.0
DROP_AT, DROP = 2, 0.5
CONFIG: dict[str, Any] = {
    "name": "seams",
    "task": "my_task:Points",
    "train": {"num_steps": 4, "loss": "my_loss:TemperedElbo", "loss_args": {"factor": FACTOR}},
    "optim": {
        "name": "my_optimizer:Strides",
        "args": {"lr": LR, "stride": STRIDE},
        "scheduler": {"name": "my_scheduler:Drop", "args": {"at": DROP_AT, "factor": DROP}},
    },
    "reduce": {"backend": "my_backend:Counting", "compression": "my_comm_hook:Signs"},
    "log": {
        "every_steps": 1,
        "tensorboard": False,
        "loggers": [{"name": "my_logger:CsvLogger", "args": {"file_name": "elbo.csv"}}],
    },
    "launch": {"platform": "my_platform:PlainProcesses", "workers": 2, "max_restarts": 0},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the user's files and the YAML that names them."""
    for file in SEAMS.glob("my_*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
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
    with (folder / "runs/seams/elbo.csv").open(newline="") as file:
        return {int(step): float(elbo) for step, elbo in csv.reader(file)}


def test_classes_of_the_user_named_in_one_yaml_train_together_and_resume(folder: Path) -> None:
    for num_steps in (4, 6):
        done = launch(folder, f"train.num_steps={num_steps}")
        output = done.stdout + done.stderr
        assert done.returncode == 0, output
        assert "2 workers over counting" in output  # the backend, on the workers that the platform has started
        assert "loc was fitted" in output

        # The hook makes gradients signs, the optimizer takes strides, the schedule halves the rate: exact in binary.
        locs = expected_locs(num_steps)
        assert parameters(folder / "runs/seams")["loc"].tolist() == locs[-1].tolist()

        # The logger has each step once, also after the run was resumed, and the objective has its factor.
        elbos = logged_elbos(folder)
        assert list(elbos) == list(range(1, num_steps + 1)) == steps_logged(folder / "runs/seams")
        for step, loc in enumerate(locs[:-1], start=1):
            expected = FACTOR * float(Normal(loc, 1.0).log_prob(Points().points).sum())
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


@pytest.mark.parametrize(
    ("key", "reference"),
    [
        ("task", "my_task:Points"),
        ("train.loss", "my_loss:TemperedElbo"),
        ("optim.name", "my_optimizer:Strides"),
        ("optim.scheduler.name", "my_scheduler:Drop"),
        ("reduce.backend", "my_backend:Counting"),
        ("reduce.compression", "my_comm_hook:Signs"),
        ("log.loggers.0.name", "my_logger:CsvLogger"),
        ("launch.platform", "my_platform:PlainProcesses"),
    ],
)
def test_no_seam_runs_code_that_the_user_does_not_trust(folder: Path, key: str, reference: str) -> None:
    module = reference.partition(":")[0]
    others = ",".join(sorted({file.stem for file in folder.glob("my_*.py")} - {module}))
    (folder / f"{module}.py").write_text("raise SystemExit('it was imported')")
    done = launch(folder, DISTOPT_TRUSTED_TASKS=others)
    assert done.returncode == 2
    assert f"run.yaml: {key}: found {reference}, but your DISTOPT_TRUSTED_TASKS allows only code of" in done.stderr
    assert "it was imported" not in done.stdout + done.stderr

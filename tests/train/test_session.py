"""A script's own loop has what a task's has: the script of docs/runs.md, launched, stopped and resumed."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pyro
import pytest
import torch

from distopt.config import ConfigError, RunConfig
from distopt.optim import Adam
from distopt.run_files import read_facts, read_metrics
from distopt.train import Session
from distopt.train.session import config_of_script
from tests.train.runs import BIN, ROOT, environment, parameters

PAGE = (ROOT / "docs" / "runs.md").read_text()
FILES = dict(re.findall(r"```(?:python|yaml) (fit\S+)\n(.*?)```", PAGE, re.DOTALL))


def fit(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Launches the script of the page."""
    for name, text in FILES.items():
        if not (folder / name).exists():
            (folder / name).write_text(text)
    command = [str(BIN / "distopt"), "launch", "fit.yaml", "log.tensorboard=false", "log.every_steps=20", *overrides]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=170)


@pytest.mark.slow
@pytest.mark.timeout(400)  # three launches, one after the other
def test_script_of_the_page_that_is_stopped_resumes_to_the_same_bits(tmp_path: Path) -> None:
    through = fit(tmp_path, "run_dir=runs/through")
    assert through.returncode == 0, through.stdout + through.stderr
    assert "mean 2.9" in through.stdout and "step 400 of 400" in through.stdout
    assert (tmp_path / "runs/through/report.html").exists()

    # Rank 1 is asked to stop in its 130th step; both ranks do, with a checkpoint of that step.
    script = FILES["fit.py"]
    asks = "        if step == 129 and worker.rank == 1:\n            os.kill(os.getpid(), signal.SIGTERM)\n"
    loop = "    for step in session.steps():"
    assert script.count(loop) == 1
    first, rest = re.split(rf"(?<={re.escape(loop)})[^\n]*\n", script)
    (tmp_path / "fit.py").write_text(f"import os, signal\n{first}\n{asks}{rest}")
    stopped = fit(tmp_path, "launch.max_restarts=0")
    assert stopped.returncode != 0 and "mean 2.9" not in stopped.stdout
    assert "stopped after step 130; run the same command again to resume" in stopped.stdout, stopped.stderr
    assert max((tmp_path / "runs/fit/checkpoints").glob("step-*")).name == "step-00000130"
    assert read_facts(tmp_path / "runs/fit")["outcome"] == "stopped"

    (tmp_path / "fit.py").write_text(script)
    resumed = fit(tmp_path)
    assert resumed.returncode == 0 and "resuming from step 130" in resumed.stdout, resumed.stdout + resumed.stderr
    expected = parameters(tmp_path / "runs/through")
    assert {name: value.tolist() for name, value in parameters(tmp_path / "runs/fit").items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    rows = [read_metrics(tmp_path / "runs" / name) for name in ("through", "fit")]
    # The first row after the resume is the mean over fewer steps.
    elbos = [{row["step"]: row["elbo"] for row in each if row["step"] != 140} for each in rows]
    assert elbos[0] == elbos[1] and len(elbos[1]) == 23
    errors = [{row["step"]: row["validation/mse"] for row in each if "validation/mse" in row} for each in rows]
    assert errors[0] == errors[1] and list(errors[1]) == list(range(50, 401, 50))
    assert errors[1][400] == pytest.approx(1.0, abs=0.1)
    assert {"elbo", "lr", "train_s", "rows_per_s"} <= rows[1][-1].keys()
    status = subprocess.run([str(BIN / "distopt"), "status"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "step 400 of 400, ELBO" in status.stdout and "checkpoint of step 400" in status.stdout


def session(folder: Path, num_steps: int, **changed: object) -> Session:
    keys = {"name": "demo", "run_dir": folder, "script": "demo.py", "log": {"every_steps": 2, "tensorboard": False}}
    return Session(
        {"optimizer": Adam({"lr": 0.1})}, num_steps=num_steps, config=RunConfig.model_validate(keys | changed)
    )


def test_rows_are_means_over_the_steps_since_the_last_one(tmp_path, capsys) -> None:
    with session(tmp_path, 5) as opened:
        for step in opened.steps():
            opened.log(elbo=float(step), width=2.0)
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["elbo"], row["width"]) for row in rows] == [(2, 0.5, 2.0), (4, 2.5, 2.0), (5, 4.0, 2.0)]
    assert {"steps_per_s", "train_s"} <= rows[0].keys() and "report: " in capsys.readouterr().out

    with session(tmp_path, 7) as opened:
        assert opened.first_step == 5
        assert list(opened.steps()) == [5, 6]
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4, 5, 6, 7]


def test_run_that_was_stopped_ends_the_process_after_a_last_checkpoint(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended, session(tmp_path, 9) as opened:
        for step in opened.steps():
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000004"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and not (tmp_path / "report.html").exists()


def test_validation_that_the_yaml_asks_for_and_the_script_lacks_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"train.validate_every_steps: found 5, .* demo.py .*Session\(..., validate="):
        session(tmp_path, 9, train={"validate_every_steps": 5})


def test_loop_that_raises_saves_nothing_and_frees_everything(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), session(tmp_path, 9) as opened:
        for step in opened.steps():
            _ = 1 / (3 - step)
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    assert read_facts(tmp_path)["outcome"] is None


def test_modules_and_anything_with_a_state_come_back(tmp_path) -> None:
    network = torch.nn.Linear(2, 1)
    for num_steps in (2, 4):
        opened = session(tmp_path, num_steps)
        opened._saved = {"network": network}
        with opened:
            if num_steps == 4:
                assert network.weight.detach().eq(7.0).all()
            for _ in opened.steps():
                torch.nn.init.constant_(network.weight, 7.0)
        torch.nn.init.constant_(network.weight, 0.0)
    pyro.clear_param_store()


@pytest.mark.parametrize(
    ("script", "name"),
    [("fit.py", "fit"), ("_fit_.py", "fit"), ("a..b.py", "script"), ("a b.py", "script"), ("", "script")],
)
def test_script_that_nothing_launched_is_named_after_its_file_where_a_run_may_have_that_name(script, name, monkeypatch):
    monkeypatch.delenv("DISTOPT_RUN_DIR", raising=False)
    monkeypatch.setattr("sys.argv", [script])
    assert config_of_script().name == name

"""The report and the comparison of real runs, and their state, as the commands give them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import distopt
from distopt.launch.cli import app
from tests.train.runs import config, launch_well, run_here


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers, `judged`, and of one of its kind with another rate, `slower`."""
    folder = tmp_path_factory.mktemp("pages")
    path = config(
        folder,
        task="tests.train.tasks:Judged",
        task_args={"guide": "AutoDelta"},
        train={"num_steps": 12, "validate_every_steps": 4},
        optim={"name": "Adam", "args": {"lr": 0.05}, "scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.9}}},
    )
    output = launch_well(path, f"run_dir={folder / 'judged'}")
    assert "distopt: starting 2 workers (" in output
    run_here(path, f"run_dir={folder / 'slower'}", "optim.args.lr=0.01", "name=slower")
    return folder


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_report_says_what_the_run_was_and_shows_its_curves(runs: Path) -> None:
    page = (runs / "judged/report.html").read_text()
    for title in (
        "a line was found",
        "ELBO over steps",
        "Learning rate",
        "Validation: mse",
        "Who waited for whom",
    ):
        assert title in page, title
    rows = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", page))
    assert rows["steps"] == "12 of 12" and rows["seed"] == "1" and rows["workers"] == "2 (torch_dist)"
    assert f"distopt {distopt.__version__}" in rows["versions"] and re.fullmatch(
        r"[0-9a-f]{12}(-dirty)?", rows["commit"]
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", rows["began"]) and re.fullmatch(
        r"\d+:\d\d:\d\d", rows["trained for"]
    )


def test_report_is_written_anew_as_it_was(runs: Path) -> None:
    path = runs / "judged/report.html"
    before = path.read_text()
    path.unlink()
    assert command("report", runs / "judged") == f"report: {path}\n"
    assert re.sub(r"data:image[^\"]*", "", path.read_text()) == re.sub(r"data:image[^\"]*", "", before)
    missing = CliRunner().invoke(app, ["report", str(runs / "nowhere")])
    assert missing.exit_code == 2 and "no run with checkpoints" in missing.output


def test_task_without_a_report_has_a_table_of_its_parameters(tmp_path: Path) -> None:
    path = config(tmp_path, task="tests.train.tasks:Cells", data={}, train={"num_steps": 2})
    run_here(path)
    page = (tmp_path / "run/report.html").read_text()
    assert "<h2>Parameters</h2>" in page and "<td>AutoNormal.scales.z</td><td>11</td>" in page
    assert "The elements of each parameter." in page


def test_comparison_has_metrics_differences_and_curves(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "comparison.html"
    output = command("compare", runs / "judged", runs / "slower", "-o", page)
    text = page.read_text()
    assert "<td>optim.args.lr</td><td>0.05</td><td>0.01</td>" in text
    assert "validation/mse, lowest" in text and "elbo, last" in text and text.count("<img") == 4
    assert "optim.args.lr" in output
    assert CliRunner().invoke(app, ["compare", str(runs / "judged")]).exit_code == 2


def test_status_tells_how_far_a_run_is(runs: Path) -> None:
    line = command("status", runs / "judged")
    assert re.search(
        r"judged\tdone\texit status 0\tstep 12 of 12, ELBO -[\d,]+, [\d,]+ rows/s, checkpoint of step 12", line
    )
    (entry,) = json.loads(command("status", runs / "judged", "--json"))
    assert (entry["state"], entry["progress"]["step"], entry["progress"]["left_s"]) == ("done", 12, 0.0)
    assert entry["progress"]["checkpoint"] == 12
    table = command("status", runs / "judged", "--watch")
    assert "12 of 12" in table and "done" in table


def test_version_is_printed() -> None:
    assert command("--version") == f"distopt {distopt.__version__}\n"

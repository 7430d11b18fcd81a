"""The state of runs is told from their directories, as lines, as JSON and as a table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from distopt.launch import status
from distopt.launch.jobs import State


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has ended well, with a row of metrics."""
    folder = tmp_path / "flights"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"name: flights\nscript: train.py\nrun_dir: {folder}\n")
    (folder / "launch.json").write_text(json.dumps({"pid": 17, "host": "h", "status": 0}))
    row = {"step": 1000, "elbo": -1234.5, "rows_per_s": 5000.0, "train_s": 10.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "run.json").write_text(json.dumps({"num_steps": 2000}))
    return folder


def test_line_has_directory_state_detail_and_progress_between_tabs(run):
    fields = status.line_of(run).split("\t")
    assert fields == [str(run), "done", "exit status 0", "step 1,000 of 2,000, ELBO -1,234, 5,000 rows/s"]
    (run / "metrics.jsonl").unlink()
    assert status.line_of(run).split("\t") == fields[:3]


def test_json_has_an_object_for_each_run_and_null_without_progress(run, tmp_path):
    first, second = json.loads(status.as_json([run, tmp_path / "none"]))
    assert (first["run"], first["state"], first["progress"]["step"]) == (str(run), "done", 1000)
    assert (second["state"], second["progress"]) == ("unknown", None) and "config.yaml" in second["detail"]


@pytest.mark.parametrize("damage", ["name: [", "script: 3"])
def test_run_whose_configuration_cannot_be_read_is_unknown_with_the_reason(damage, run):
    (run / "config.yaml").write_text(damage)
    state = status.state_of(run)
    assert state.phase == "unknown" and "config.yaml" in state.detail


def test_table_follows_runs_until_all_have_ended_and_shows_those_that_come_later(run, monkeypatch, capsys):
    states = iter([State("running"), State("running"), State("done"), State("done")])
    monkeypatch.setattr(status, "state_of", lambda directory: next(states))
    monkeypatch.setattr(status, "WATCH_S", 0.0)
    monkeypatch.setenv("COLUMNS", "250")
    listed = iter([[run], [run], [run, run.parent / "new"]])
    status.watch(lambda: next(listed))
    assert list(states) == []
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "1,000 of 2,000" in shown and "-1,234" in shown and "done" in shown


def test_narrow_table_folds_names_and_loses_no_end_of_one(run, monkeypatch, capsys):
    long = run.rename(run.parent / "sales-of-the-year-by-shop-and-week-017")
    (long / "config.yaml").write_text(f"name: flights\nscript: train.py\nrun_dir: {long}\n")
    monkeypatch.setenv("COLUMNS", "80")
    status.watch(lambda: [long])
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80 and "rows/s" not in lines[0] and "-1,234" in "".join(lines)
    assert str(long) in "".join(line[: line.find("  ")] if "done" in line else line.strip() for line in lines[2:])


def test_interrupt_ends_the_table_without_an_error(run, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    status.watch(interrupted)

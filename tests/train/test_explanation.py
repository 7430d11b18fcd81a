"""What `distopt doctor CONFIG --capture` says of a run."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from distopt.config import ConfigError, load_config, parse_config
from distopt.launch.cli import app
from distopt.train import explain_run
from tests.train.runs import config


def test_run_that_can_be_captured_is_explained_and_leaves_nothing_behind(tmp_path):
    report = explain_run(load_config(config(tmp_path)))
    assert report.refusal is None
    assert report.num_recorded > report.num_operations > 0
    assert not (tmp_path / "run").exists()


def test_command_says_what_is_captured_or_what_is_missing(tmp_path):
    shown = CliRunner().invoke(app, ["doctor", str(config(tmp_path)), "--capture"])
    assert shown.exit_code == 0 and "Steps are captured" in shown.output and "eagerly" not in shown.output
    shown = CliRunner().invoke(app, ["doctor", str(config(tmp_path)), "train.capture=off", "--capture"])
    assert shown.exit_code == 0 and "its train.capture is off" in shown.output
    refused = CliRunner().invoke(app, ["doctor", "--capture"])
    assert refused.exit_code != 0 and "distopt doctor CONFIG --capture" in refused.output


def test_script_is_refused_with_the_call_to_make_in_it():
    with pytest.raises(ConfigError, match="explain_capture"):
        explain_run(parse_config("name: run\nscript: train.py\n", []))

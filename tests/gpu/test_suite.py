"""The suite for a GPU is whole and importable on a machine that has none, and says how it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.__main__ import NOTHING_RAN, SUITES, main, run_suite, suite_of
from tests.gpu.checks import Skip, Suite

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make test-gpu`")
def test_without_a_gpu_every_check_is_skipped_for_that_reason_and_the_status_is_not_0(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "--json", str(tmp_path / "results.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == NOTHING_RAN, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {(result["status"], result["detail"]) for result in results} == {("skipped", "no GPU")}
    assert [result["name"] for result in results] == [name for suite in SUITES for name in suite_of(suite).names()]
    assert f"{len(results)} skipped" in done.stdout


def test_whole_suite_takes_at_most_six_minutes_even_if_every_one_of_its_parts_hangs():
    assert sum(suite_of(name).limit_s for name in SUITES) <= 360


def test_checks_of_checkpoints_pass_on_the_cpu_too():
    results = run_suite("checkpoints", torch.device("cpu"))
    assert {result.status for result in results} == {"ok", "skipped"}, [result.detail for result in results]


def test_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["speeed"])
    assert "there are optimizers" in capsys.readouterr().err


def test_failed_check_is_reported_with_its_traceback_and_ends_no_other():
    suite = Suite("example", 5)

    @suite.check("fails")
    def _(device):
        raise ValueError("the cause")

    @suite.check("cannot be made")
    def _(device):
        raise Skip("no GPU")

    @suite.check("measures")
    def _(device):
        return {"ms": 1.5}

    failed, skipped, measured = suite.run(torch.device("cpu"))
    assert failed.status == "failed" and "the cause" in failed.detail
    assert (skipped.status, skipped.detail) == ("skipped", "no GPU")
    assert measured.status == "ok" and measured.figures == {"ms": 1.5}


def test_suite_that_hangs_is_ended_and_its_checks_count_as_not_run(monkeypatch, capsys):
    monkeypatch.setattr(suite_of("optimizers"), "limit_s", 0.5)
    results = run_suite("optimizers", torch.device("cpu"))
    assert {result.status for result in results} == {"not run"}
    assert "was ended after its 0.5 s" in capsys.readouterr().out

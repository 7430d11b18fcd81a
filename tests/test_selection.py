"""A selection of tests of which none can run fails, and says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_here(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests/docker/test_cpu_image.py"], "nothing ran: builds an image: make test-images"),
        (["tests/test_ray.py"], "nothing ran: takes minutes: pytest tests --slow runs it"),
        (["tests/chaos", "-k", "many_runs"], "nothing ran: takes minutes: pytest tests --slow runs it"),
    ],
)
def test_selection_of_which_all_is_skipped_fails_and_says_what_is_missing(arguments, message):
    done = pytest_here(*arguments)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert message in done.stdout


def test_tests_in_several_processes_are_judged_together():
    done = pytest_here("-n", "2", "tests/test_ray.py")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr
    assert "nothing ran: takes minutes" in done.stdout


@pytest.mark.parametrize(("folder", "marker"), [("tests/docker", "images"), ("tests/kubernetes", "kubernetes")])
def test_what_was_asked_for_and_lacks_a_program_fails_though_something_else_runs(folder, marker):
    done = pytest_here(folder, "-m", marker, **{f"DISTOPT_TEST_{marker.upper()}": "1", "PATH": "/nowhere"})
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "apt-get install buildah" in done.stdout or "sudo" in done.stdout


@pytest.mark.slow
def test_selection_of_which_something_runs_is_judged_by_that():
    done = pytest_here("tests/chaos", "-k", "many_runs or chosen_by_the_environment")
    assert (done.returncode, "nothing ran" in done.stdout) == (0, False), done.stdout

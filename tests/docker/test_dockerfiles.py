"""What holds for the images' files before anything is built."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [path.name for path in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, "--no-color", path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_stays_under_40_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40


def test_both_are_the_same_once_torch_and_horovod_are_there() -> None:
    ends = {path.read_text().partition("FROM torch AS venv")[2].replace("CUDA", "CPU") for path in DOCKERFILES}
    assert len(ends) == 1


def test_requirements_are_those_of_the_package_and_the_named_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = subprocess.run(
        [sys.executable, "docker/requirements.py", "mpi", "examples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    extras = project["optional-dependencies"]
    assert done.stdout.splitlines() == project["dependencies"] + extras["mpi"] + extras["examples"]

"""What is published: one version, files that pass the checks of the index, a wheel that runs README's script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "xxhash": "python-xxhash"}


def test_version_is_the_same_wherever_it_is_said() -> None:
    recipe = yaml.safe_load((ROOT / "conda/recipe.yaml").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == version("distopt") == recipe["context"]["version"] == citation["version"]


def test_conda_recipe_needs_what_the_wheel_needs() -> None:
    recipe = yaml.safe_load((ROOT / "conda/recipe.yaml").read_text())
    wanted = {"python": PROJECT["requires-python"]}
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        wanted[CONDA_NAMES.get(requirement.name, requirement.name)] = str(requirement.specifier)
    needed = dict(line.split(" ", 1) for line in recipe["requirements"]["run"])
    assert needed.keys() == wanted.keys()
    for name, spec in wanted.items():
        assert set(needed[name].split(",")) == set(spec.split(",")), name


def test_release_workflow_builds_by_make_and_holds_no_password() -> None:
    text = (ROOT / ".github/workflows/release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert "secrets." not in text and "password" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    assert any(step.get("run") == "make dist" for step in jobs["build"]["steps"])
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"dist", "audit", "docs"} <= set(targets)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is made of it."""
    pytest.importorskip("build", reason="make setup-dev installs it")
    folder = tmp_path_factory.mktemp("release")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "runs", "tests")
    shutil.copytree(ROOT, folder / "source", ignore=unwanted)
    build = [sys.executable, "-m", "build", "-q", "--no-isolation", "-o", str(folder), str(folder / "source")]
    done = subprocess.run(build, env=os.environ | {"DISTOPT_PURE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_files_pass_the_checks_of_the_index(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    [sdist] = dist.glob("*.tar.gz")
    assert wheel.name == f"distopt-{PROJECT['version']}-py3-none-any.whl"
    for command in (["twine", "check", "--strict", str(wheel), str(sdist)], ["check-wheel-contents", str(wheel)]):
        program = Path(sys.executable).parent / command[0]
        if not program.exists():
            pytest.skip(f"{program.name} is not installed; make setup-dev installs it")
        done = subprocess.run([program, *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"distopt/optim/_bulk.cpp", "configs/flights.yaml", "SECURITY.md", "CITATION.cff"} <= names
    assert not any(name.startswith("tests/") for name in names)
    assert "distopt/py.typed" in zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def installed(dist: Path) -> Path:
    """A new environment with the wheel; its dependencies are those of the environment of the tests."""
    # A path in a .pth file is searched, but its own .pth files, by which this checkout is installed, are not read.
    folder = dist / "venv"
    venv.create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    [wheel] = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--no-warn-script-location", "--ignore-installed", str(wheel)], check=True)
    return folder


def test_wheel_with_its_dependencies_and_nothing_else_runs_the_script_of_the_readme(
    installed: Path, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    script = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    (tmp_path / "script.py").write_text(f"{script}\nprint(distopt.__file__, pyro.param('AutoNormal.locs.mean').item())")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [installed / "bin/python", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home, mean = done.stdout.split()
    assert Path(home).is_relative_to(installed)
    assert abs(float(mean) - 3.0) < 0.05

    shown = subprocess.run([installed / "bin/distopt", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.strip() == f"distopt {PROJECT['version']}"


@pytest.mark.slow
def test_typed_script_of_a_user_passes_the_strict_check_of_the_installed_package(
    installed: Path, tmp_path: Path
) -> None:
    """`make types` checks the same script against the checkout, which takes seconds."""
    shutil.copy(ROOT / "tests/typed_user.py", tmp_path / "user.py")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed / "bin/python"), "user.py"]
    done = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_checkout_and_its_stubs_pass_the_checks_of_types() -> None:
    done = subprocess.run(["make", "types"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_wheel_holds_the_loops_in_c_and_they_serve_its_torch(installed: Path, dist: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DISTOPT_PURE")}
    out = dist / "compiled"
    build = [sys.executable, "-m", "build", "-q", "--no-isolation", "--wheel", "-o", str(out), str(dist / "source")]
    done = subprocess.run(build, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = out.glob("*.whl")
    checked = subprocess.run(
        [Path(sys.executable).parent / "check-wheel-contents", str(wheel)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout

    unpacked = out / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = "from distopt.optim import packing; from distopt.infer.capture import program; import distopt; "
    code += "print(distopt.__file__, packing._compiled is not None, program.compiled is not None)"
    command = [installed / "bin/python", "-c", code]
    there = environment | {"PYTHONPATH": str(unpacked)}
    shown = subprocess.run(command, cwd=out, env=there, capture_output=True, text=True)
    assert shown.stdout.split() == [str(unpacked / "distopt/__init__.py"), "True", "True"], shown.stderr

"""The matrix of releases: which Pythons it finds, and what it says of those that are not there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("matrix_of_releases", ROOT / "tools" / "test_matrix.py")
assert spec is not None and spec.loader is not None
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
BROKEN = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"


def install(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def no_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))


def test_interpreter_on_the_path_is_found_and_one_that_does_not_start_is_passed_over(tmp_path: Path) -> None:
    starts = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    assert matrix.find_interpreter(HERE) is None
    shim = install(tmp_path / f"bin/python{HERE}", BROKEN)
    assert matrix.find_interpreter(HERE) is None
    of_pyenv = install(tmp_path / f"pyenv/versions/{HERE}.4/bin/python{HERE}", starts)
    assert matrix.find_interpreter(HERE) == of_pyenv
    shim.write_text(starts)
    assert matrix.find_interpreter(HERE) == shim


def test_interpreter_of_another_version_than_its_name_is_passed_over(tmp_path: Path) -> None:
    install(tmp_path / "bin/python3.99", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert matrix.find_interpreter("3.99") is None


def test_python_that_is_not_here_is_said_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["test_matrix.py"])
    monkeypatch.setenv("ONLY", "python3.12")
    assert matrix.main() == 0
    assert "python3.12: not tested: there is no python3.12 on PATH" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "status", "expected"),
    [("no such release", 0, "not installed: no such release"), (Path("python"), 1, "failed with exit status 1")],
)
def test_python_that_cannot_be_set_up_or_fails_is_a_failure(
    environment: Path | str, status: int, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    program = install(tmp_path / "environment/bin/python", f"#!/bin/sh\nexit {status}\n")
    (tmp_path / "environment/source").mkdir()
    monkeypatch.setattr(matrix, "find_interpreter", lambda version: Path("python"))
    made = environment if isinstance(environment, str) else program
    monkeypatch.setattr(matrix, "make_python_environment", lambda interpreter, version: made)
    monkeypatch.setattr(sys, "argv", ["test_matrix.py"])
    monkeypatch.setenv("ONLY", "python3.13")
    assert matrix.main() == 1
    assert f"python3.13: {expected}" in capsys.readouterr().out

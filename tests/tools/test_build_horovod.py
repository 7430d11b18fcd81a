"""The Horovod build script: what it says when something is missing, and what it changes in the source."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("build_horovod", ROOT / "tools" / "build_horovod.py")
assert spec is not None and spec.loader is not None
build_horovod = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_horovod)


def test_missing_tools_without_compiler_names_the_compiler(tmp_path: Path) -> None:
    assert "C++ compiler" in build_horovod.missing_tools(str(tmp_path))


def test_missing_tools_without_package_names_it_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "cmake":
            raise build_horovod.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(build_horovod, "version", version)
    monkeypatch.setattr(build_horovod.shutil, "which", lambda *_args, **_kwargs: "/bin/c++")
    message = build_horovod.missing_tools("")
    assert "cmake" in message and "pip install" in message and "\n" not in message


@pytest.mark.parametrize("line", ["set(CMAKE_CXX_STANDARD 14)", "    set(CMAKE_CXX_STANDARD 11)"])
def test_set_cxx_standard_where_older_sets_17(tmp_path: Path, line: str) -> None:
    file = tmp_path / "CMakeLists.txt"
    file.write_text(f"project(x)\n{line}\nadd_library(y)\n")
    build_horovod.set_cxx_standard(file)
    assert "set(CMAKE_CXX_STANDARD 17)" in file.read_text() and "add_library(y)" in file.read_text()


def test_set_cxx_standard_where_none_is_set_refuses(tmp_path: Path) -> None:
    file = tmp_path / "CMakeLists.txt"
    file.write_text("project(x)\n")
    with pytest.raises(SystemExit, match="sets no C\\+\\+ standard"):
        build_horovod.set_cxx_standard(file)


def test_build_key_changes_with_torch_and_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    key = build_horovod.build_key(None, False)
    assert key != build_horovod.build_key(None, True)
    monkeypatch.setattr(build_horovod, "version", lambda _package: "9.9")
    assert key != build_horovod.build_key(None, False)


def test_failed_build_shows_the_logs_end_and_its_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "build.log"
    with log.open("w") as out, pytest.raises(SystemExit, match="status 3; its log is"):
        build_horovod.run_with_progress(
            ["sh", "-c", "echo the real cause; exit 3"], {"PATH": "/bin:/usr/bin"}, out, log
        )
    assert "the real cause" in capfd.readouterr().err

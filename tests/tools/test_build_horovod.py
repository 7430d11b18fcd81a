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


def test_missing_tools_without_make_names_make(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(mode=0o755)
    assert "no make" in build_horovod.missing_tools(str(tmp_path))


def test_cuda_that_came_as_wheels_gets_the_names_that_linkers_look_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, nccl = tmp_path / "nvidia/cu13", tmp_path / "nvidia/nccl"
    for file in (cuda / "bin/nvcc", cuda / "lib/libcudart.so.13", nccl / "lib/libnccl.so.2"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    monkeypatch.setattr(build_horovod.sysconfig, "get_path", lambda _name: str(tmp_path))
    for _ in range(2):  # a second build finds the links in place
        result = build_horovod.cuda_of_wheels("")
    assert (cuda / "lib64/libcudart.so").read_text() == "libcudart.so.13"
    assert (nccl / "lib/libnccl.so").read_text() == "libnccl.so.2"
    assert (result["HOROVOD_CUDA_HOME"], result["HOROVOD_NCCL_HOME"]) == (str(cuda), str(nccl))


def test_cuda_of_the_machine_is_left_to_itself(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.touch(mode=0o755)
    assert build_horovod.cuda_of_wheels(str(tmp_path)) == {}


def test_missing_tools_without_package_names_it_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "cmake":
            raise build_horovod.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(build_horovod, "version", version)
    monkeypatch.setattr(build_horovod.shutil, "which", lambda *_args, **_kwargs: "/bin/c++")
    message = build_horovod.missing_tools("")
    assert "cmake" in message and "pip install" in message and "\n" not in message


@pytest.mark.parametrize(
    "line", ["set(CMAKE_CXX_STANDARD 14)", "    set(CMAKE_CXX_STANDARD 11)", "set(CMAKE_CUDA_STANDARD 11)"]
)
def test_set_cxx_standard_where_older_sets_17(tmp_path: Path, line: str) -> None:
    file = tmp_path / "CMakeLists.txt"
    file.write_text(f"project(x)\n{line}\nadd_library(y)\n")
    build_horovod.set_cxx_standard(file)
    assert file.read_text() == f"project(x)\n{line[:-3]}17)\nadd_library(y)\n"


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

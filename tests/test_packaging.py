"""What an installed distopt contains, and which way its imports run where import-linter cannot look."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def packages_on_disk() -> set[str]:
    packages = set()
    for top, name in ((ROOT / "distopt", "distopt"), (ROOT / "launch", "distopt.launch")):
        for init in top.rglob("__init__.py"):
            packages.add(".".join([name, *init.parent.relative_to(top).parts]))
    return packages


def test_every_package_on_disk_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == packages_on_disk()


def built(tmp_path: Path, **env: str) -> set[str]:
    """The files in a wheel of the checkout, built away from it."""
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    pip += ["-w", str(tmp_path), "."]
    done = subprocess.run(pip, cwd=source, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())


def test_wheel_holds_launcher_stubs_and_type_marker_and_is_built_without_a_compiler(tmp_path: Path) -> None:
    names = built(tmp_path, CC="false", CXX="false")
    modules = {f"distopt/{path.relative_to(ROOT / 'distopt')}" for path in (ROOT / "distopt").rglob("*.py*")}
    modules |= {f"distopt/launch/{path.relative_to(ROOT / 'launch')}" for path in (ROOT / "launch").rglob("*.py")}
    missing = {name for name in modules if "__pycache__" not in name} - names
    assert not missing
    assert "distopt/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.endswith(".so") for name in names)


LIGHT = (
    "distopt.config",
    "distopt.launchers",
    "distopt.run_files",
    "distopt.worker_error",
    "distopt.read_only_server",
    "distopt.cgroups",
)  # they import neither torch nor Pyro


def test_launcher_imports_nothing_heavy_at_module_level() -> None:
    for path in (ROOT / "launch").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                is_distopt = node.module == "distopt"
                imported = [f"distopt.{alias.name}" for alias in node.names] if is_distopt else [node.module]
            for name in imported:
                assert name.split(".")[0] not in ("torch", "pyro"), f"{path.name} imports {name}"
                assert not name.startswith("distopt") or name.startswith(LIGHT), f"{path.name} imports {name}"


def test_command_line_starts_without_torch() -> None:
    code = "import sys, distopt.launch.cli; print([m for m in ('torch', 'pyro') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"

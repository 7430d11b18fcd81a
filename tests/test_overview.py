"""What a user sees first of the package: `help(distopt)` is an overview, and names complete."""

from __future__ import annotations

import importlib
import importlib.metadata
import pydoc
import subprocess
import sys

import pytest

import distopt

PACKAGES = "backends checkpoint config data infer optim reduce train".split()


def test_help_names_everything_that_the_package_offers() -> None:
    overview = pydoc.plain(pydoc.render_doc(distopt)).split("PACKAGE CONTENTS")[0]
    assert [name for name in dir(distopt) if f"    {name}" not in overview and name != "__version__"] == []
    for name in ("DistributedOptimizer", "sharded_plate", "GlobalBatches", "Checkpointer", "Task"):
        assert name in overview


def test_names_that_complete_are_those_that_are_there() -> None:
    assert {*distopt.__all__, *PACKAGES} == set(dir(distopt))
    for name in dir(distopt):
        assert getattr(distopt, name) is not None


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_of_a_package_completes(package: str) -> None:
    module = importlib.import_module(f"distopt.{package}")
    assert set(module.__all__) <= set(dir(module))
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_import_and_completion_are_cheap() -> None:
    code = "import sys, distopt; dir(distopt); print({'torch', 'pyro', 'pydantic', 'typer'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_version_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = distopt.__version__
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pytest.fail(f"{name} is looked up again"))
    assert distopt.__version__ == known == importlib.metadata.distribution("distopt").version

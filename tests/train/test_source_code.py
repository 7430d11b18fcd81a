"""Files that ranks compare are all that a model may import, by names that do not depend on where they are."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distopt.train.source_code import differing_files, source_digests


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], None]]:
    before = set(sys.modules)

    def load(folder: Path, name: str) -> None:
        monkeypatch.syspath_prepend(folder)
        importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_all_files_of_a_package_are_compared_imported_or_not_and_folders_of_data_are_not(tmp_path, imported) -> None:
    files = {"survey/__init__.py": "", "survey/task.py": "", "survey/priors.py": "SCALE = 1", "survey/data/x.py": ""}
    write(tmp_path, files | {"survey/models/__init__.py": "", "survey/models/tree.py": "", "other.py": ""})
    imported(tmp_path, "survey.task")
    digests = source_digests(["survey.task", "nowhere"])
    names = {"survey", "survey.task", "survey.priors", "survey.models", "survey.models.tree"}
    assert {name for name in digests if name.startswith(("survey", "other"))} == names
    assert digests["survey.priors"] == hashlib.sha256(b"SCALE = 1").hexdigest()


def test_files_beside_a_module_without_a_package_are_compared(tmp_path, imported) -> None:
    write(tmp_path, {"lonely_task.py": "", "lonely_priors.py": "SCALE = 1"})
    imported(tmp_path, "lonely_task")
    assert {"lonely_task", "lonely_priors"} <= set(source_digests(["lonely_task"]))


def test_modules_below_the_working_folder_are_compared_but_for_installed_ones(tmp_path, imported, monkeypatch) -> None:
    library = tmp_path / ".venv/lib/site-packages"
    write(library, {"bought.py": ""})
    write(tmp_path, {"helpers/rates.py": "", "unused.py": ""})
    monkeypatch.chdir(tmp_path)
    imported(library, "bought")
    imported(tmp_path / "helpers", "rates")
    assert set(source_digests([])) == {"rates"}


def test_module_that_one_rank_alone_has_does_not_differ() -> None:
    digests = [{"a": "1", "b": "2", "figures": "3"}, {"a": "1", "b": "4"}, {"a": "1", "b": "2"}]
    assert differing_files(digests) == {"b": ["2", "4", "2"]}

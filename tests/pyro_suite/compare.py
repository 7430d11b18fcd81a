"""Runs the same tests of Pyro over `pyro.optim` and over `distopt.optim`, and compares them test by test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from tests.pyro_suite.source import fetch, replace_inference

ROOT = Path(__file__).parents[2]
EXPECTED = Path(__file__).with_name("expected_failures.txt")
GOOD = ("passed", "skipped")


def outcomes(selection: Sequence[str], scratch: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the outcome of each selected test by its name, over `pyro.optim` and over `distopt.optim`.

    Over `pyro.optim` only those tests run that did not pass over `distopt.optim`: of the others nothing is asked.

    Args:
        selection: Arguments of pytest: files and tests, relative to Pyro's repository.
        scratch: A folder to write the two copies to.

    Raises:
        NoSource: Pyro's tests cannot be had here.
    """
    folders = [scratch / "pyro", scratch / "distopt"]
    for folder in folders:
        folder.mkdir(parents=True)
        fetch(folder)
    replace_inference(folders[1] / "tests")
    ours = _run(folders[1], selection)
    doubtful = [test for test, outcome in ours.items() if outcome != "passed"]
    return _run(folders[0], doubtful) if doubtful else {}, ours


def expected_failures(path: Path = EXPECTED) -> dict[str, str]:
    """Reads `test # reason`, one a line; empty lines and those that begin with # are comments.

    Raises:
        ValueError: A line has no reason, or a test is listed twice.
    """
    reasons: dict[str, str] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        test, _, reason = line.partition(" # ")
        if not reason.strip() or test in reasons:
            raise ValueError(f"{path.name}:{number}: expected `test # reason`, each test once; found {line!r}")
        reasons[test] = reason.strip()
    return reasons


def differences(plain: Mapping[str, str], ours: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Lists the tests that distopt changes for the worse, and the expected failures that came true no more.

    A test that fails on plain Pyro, too, is not ours.
    """
    worse = [
        f"{test}: {plain.get(test, 'passed')} over pyro.optim, over distopt.optim: {outcome}"
        for test, outcome in sorted(ours.items())
        if outcome not in ("passed", plain.get(test)) and plain.get(test, "passed") in GOOD and test not in expected
    ]
    healed = [
        f"{test}: passes though expected_failures.txt lists it: remove its line ({reason})"
        for test, reason in sorted(expected.items())
        if ours.get(test) == "passed"
    ]
    return worse + healed


def _run(folder: Path, selection: Sequence[str]) -> dict[str, str]:
    """Runs one copy by pytest with Pyro's own settings, in a process without our conftest and plugins."""
    results = folder / "results.xml"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={results}",
        "-o",
        "junit_family=xunit1",
        *selection,
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not results.exists():
        raise AssertionError(f"{' '.join(command)} in {folder} wrote no results:\n{done.stdout[-4000:]}")
    return dict(_read(results))


def _read(results: Path) -> Iterator[tuple[str, str]]:
    """Yields (test, outcome) of pytest's JUnit file; an outcome that is not good ends with its message."""
    for case in ElementTree.parse(results).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        test = _node_id(case.get("file"), case.get("classname") or "", case.get("name") or "")
        if problem is None:
            yield test, "passed"
        elif problem.tag == "skipped":
            yield test, "skipped"
        else:
            yield test, f"{problem.tag}: {' '.join((problem.get('message') or '').split())[:300]}"


def _node_id(file: str | None, classname: str, name: str) -> str:
    """Returns what pytest calls a test on its command line; of a file that could not be imported, its path."""
    if file is None:
        return f"{name.replace('.', '/')}.py"
    module = file.removesuffix(".py").replace("/", ".")
    return "::".join([file, *classname.removeprefix(module).strip(".").split("."), name]).replace("::::", "::")

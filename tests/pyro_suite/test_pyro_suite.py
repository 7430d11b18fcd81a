"""Pyro's own tests of its optimizers pass over ours; `make test-pyro` runs those of all its inference, too."""

from __future__ import annotations

import subprocess

import pytest

from tests.pyro_suite.compare import differences, expected_failures, outcomes
from tests.pyro_suite.source import SOURCE, NoSource, fetch, replace_inference

QUICK = ("tests/optim",)
FILE = """import pyro
import pyro.optim as optim
from pyro import optim
from pyro.optim.multi import Newton
adam = pyro.optim.Adam({})
pyro_optim = mypyro.optim
"""
REPLACED = """import distopt.infer
import distopt.optim
import pyro
import distopt.optim as optim
from distopt import optim
from distopt.optim.multi import Newton
adam = distopt.optim.Adam({})
pyro_optim = mypyro.optim
"""


@pytest.mark.timeout(600)
def test_tests_of_pyros_optimizers_end_as_over_pyro_itself(tmp_path):
    try:
        plain, ours = outcomes(QUICK, tmp_path)
    except NoSource as error:
        pytest.skip(str(error))
    assert len(ours) >= 40, ours
    assert differences(plain, ours, expected_failures()) == []


def test_replacing_changes_every_way_to_import_the_optimizers_and_nothing_else(tmp_path):
    (tmp_path / "test_some.py").write_text(FILE)
    (tmp_path / "test_other.py").write_text("import pyro\n")
    assert replace_inference(tmp_path) == [tmp_path / "test_some.py"]
    assert (tmp_path / "test_some.py").read_text() == REPLACED
    assert (tmp_path / "test_other.py").read_text() == "import pyro\n"


def test_difference_is_found_and_failures_of_pyro_itself_are_not_ours():
    plain = {"worse": "passed", "bad": "failure: x", "listed": "passed", "skips": "skipped", "now skips": "passed"}
    ours = {"same": "passed", "worse": "failure: y", "bad": "failure: z", "listed": "failure: w", "healed": "passed"}
    ours |= {"skips": "skipped", "now skips": "skipped", "not run again": "failure: v"}
    problems = differences(plain, ours, {"listed": "a reason", "healed": "another"})
    assert [line.partition(":")[0] for line in problems] == ["not run again", "now skips", "worse", "healed"]


PYRO_TEST = """import unittest
import pyro.optim
import pytest

def test_good():
    pass

@pytest.mark.parametrize("name", ["a b", "[x]"])
def test_ours(name):
    assert pyro.optim.__name__.startswith("pyro")

def test_bad():
    assert False, "for everybody"

class SomeTests(unittest.TestCase):
    def test_method(self):
        assert pyro.optim.__name__.startswith("pyro")
"""


def test_tests_that_fail_over_distopt_run_again_over_pyro_and_those_alone_are_differences(tmp_path, monkeypatch):
    (tmp_path / "source" / "tests" / "optim").mkdir(parents=True)
    (tmp_path / "source" / "tests" / "__init__.py").touch()
    (tmp_path / "source" / "tests" / "optim" / "__init__.py").touch()
    (tmp_path / "source" / "tests" / "optim" / "test_some.py").write_text(PYRO_TEST)
    (tmp_path / "source" / "setup.cfg").write_text("[tool:pytest]\n")
    monkeypatch.setenv(SOURCE, str(tmp_path / "source"))
    plain, ours = outcomes(["tests/optim"], tmp_path / "scratch")
    assert {test: outcome.partition(":")[0] for test, outcome in plain.items()} == {
        "tests/optim/test_some.py::test_ours[a b]": "passed",
        "tests/optim/test_some.py::test_ours[[x]]": "passed",
        "tests/optim/test_some.py::test_bad": "failure",
        "tests/optim/test_some.py::SomeTests::test_method": "passed",
    }
    assert len(ours) == 5
    assert len(differences(plain, ours, {})) == 3


def test_list_of_expected_failures_wants_a_reason_for_each(tmp_path):
    path = tmp_path / "expected.txt"
    path.write_text("# a comment\n\ntests.a::b[x: y] # since torch\n")
    assert expected_failures(path) == {"tests.a::b[x: y]": "since torch"}
    for wrong in ("tests.a::b\n", "tests.a::b # \n", "t # one\nt # two\n"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="expected.txt:"):
            expected_failures(path)


@pytest.mark.parametrize("bare", [False, True])
def test_tests_come_from_a_checkout_or_a_repository_and_a_wrong_one_is_named(bare, tmp_path, monkeypatch):
    work = tmp_path / "work"
    (work / "tests" / "optim").mkdir(parents=True)
    (work / "tests" / "optim" / "test_optim.py").write_text("")
    (work / "setup.cfg").write_text("[tool:pytest]\n")
    source = work
    if bare:
        source = tmp_path / "bare.git"
        git = ["git", "-C", str(work), "-c", "user.name=x", "-c", "user.email=x@localhost"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["clone", "-q", "--bare", ".", source]):
            subprocess.run([*git, *map(str, command)], check=True)
    monkeypatch.setenv(SOURCE, str(source))
    target = tmp_path / "target"
    target.mkdir()
    fetch(target)
    assert (target / "tests" / "optim" / "test_optim.py").exists() and (target / "setup.cfg").exists()
    monkeypatch.setenv(SOURCE, str(tmp_path))
    with pytest.raises(NoSource, match=str(tmp_path)):
        fetch(tmp_path / "none")

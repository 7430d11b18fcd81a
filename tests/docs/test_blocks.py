"""Every fenced block of README and docs is run or says why not, and every tutorial runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest

pytest.importorskip("sybil", reason="blocks are found by Sybil; make setup-dev installs it")

from distopt.backends import current
from tests.docs.blocks import PAGES, ROOT, TUTORIALS, BlockError, run_page, run_tutorial


@pytest.fixture(autouse=True)
def process_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in an empty folder, whose files can be imported, and forgets the modules that a page brings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("MPLBACKEND", "agg")
    known = set(sys.modules)
    environment = dict(os.environ)
    yield
    os.environ.clear()  # libraries that a page imports set variables, as scikit-learn does
    os.environ.update(environment)
    current().close()
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    assert run_page(page, tmp_path) == run_page(page, None)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python\nprint(1 +)\n```", "SyntaxError"),
        ("```python\nimport distopt\ndistopt.inti()\n```", "has no attribute 'inti'"),
        ("```yaml\ntrain: {num_step: 3}\n```", "Did you mean train.num_steps"),
        ("```console\n$ distopt launhc\n```", "exit status 2"),
        ("```console\n$ echo one\ntwo\n```", "printed\none"),
        ("```\nno kind\n```", "found a block of ''"),
        ("```sh\nls\n```", "found a block of 'sh'"),
        ("```text\npip install distopt\n```", "found a block of 'text'"),
    ],
)
def test_wrong_block_fails_and_the_message_names_page_and_line(block: str, message: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\nText.\n\n{block}\n\n```python\nright = 1\n```\n")
    with pytest.raises(BlockError, match="page.md:5: ") as caught:
        run_page(page, tmp_path)
    assert message in str(caught.value)


def test_block_that_is_not_run_needs_a_reason(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('<!-- skip: next "why" -->\n```sh\nexit 1\n```\n\n```python\nassert True\n```\n')
    assert dict(run_page(page, tmp_path)) == {f"{page}:2: why": 1, "run": 1}
    page.write_text("<!-- skip: next -->\n```sh\nexit 1\n```\n")
    with pytest.raises(BlockError, match="no reason says why"):
        run_page(page, tmp_path)


OUTCOMES = {
    "hierarchical_regression": lambda names: names["elbos"][-1] > names["elbos"][0] and names["effects"].std() > 1,
    "latent_per_datapoint": lambda names: (names["found"]["AutoNormal.locs.z"] - names["expected"]).abs().max() < 0.15,
    "variational_autoencoder": lambda names: names["error"] < 0.8 * names["blank"],
}
"""What is true of the names of a tutorial at its end."""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_and_finds_what_it_says(tutorial: Path) -> None:
    importlib.import_module("matplotlib.pyplot").close("all")
    names = run_tutorial(tutorial)
    assert OUTCOMES[tutorial.stem](names)
    pyro.clear_param_store()
    importlib.import_module("matplotlib.pyplot").close("all")

"""The documentation builds without a warning, names everything that is public, and needs no network to be read."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = [
    path.stem for path in sorted((ROOT / "docs/reference/api").glob("*.md"))
]  # one page for each package that users import

pytest.importorskip("sphinx", reason="the docs need Sphinx; make setup-dev installs it")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages; tutorials are not run here, test_tutorials.py runs them."""
    folder = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-D", "nb_execution_mode=off", "-b", "html"]
    done = subprocess.run([*command, "docs", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_docs_build_without_a_warning_and_name_all_that_is_public(pages: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((pages / "objects.inv").read_bytes(), uri="")
    documented = {name.rpartition(".")[2] for kind in inventory.data.values() for name in kind}
    for package in PUBLIC:
        public = set(getattr(importlib.import_module(package), "__all__", ())) - {"__version__"}
        assert public <= documented, (package, sorted(public - documented))


def test_pages_load_nothing_from_elsewhere_and_can_be_searched(pages: Path) -> None:
    for page in pages.rglob("*.html"):
        text = page.read_text()
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(https?:)?//[^"]*"', text)
        assert not loaded, (page, loaded)
    for style in pages.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import [\"']?https?:", style.read_text()), style
    assert "Checkpointer" in (pages / "searchindex.js").read_text()


def test_build_ends_with_an_error_at_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text('extensions = ["myst_nb"]\nmyst_heading_anchors = 4\n')
    (tmp_path / "index.md").write_text("# Page\n\n[here](#page), [there](missing.md)\n")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "missing.md" in done.stderr

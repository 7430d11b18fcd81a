"""Pyro's own tests: where they come from, and a copy of them whose optimizers and SVI are those of distopt."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tarfile
from importlib.metadata import metadata, version
from io import BytesIO
from pathlib import Path

SOURCE = "PYRO_TESTS"
"""Environment variable: a checkout of Pyro, or a git repository of it, that is used in place of a clone."""

CLONE_S = 120
TREE = ("tests", "setup.cfg")

_MODULE = re.compile(r"\bpyro\.optim\b")
_SVI = re.compile(r"\bpyro\.infer\.SVI\b")
_MEMBER = re.compile(r"^(\s*)from pyro import optim\b", re.MULTILINE)


class NoSource(Exception):
    """Pyro's tests cannot be had here; the message says what was tried."""


def fetch(target: Path) -> None:
    """Lays Pyro's tests, and the settings of pytest that they need, into the new folder `target`.

    The source distribution on the package index lacks all but five files of Pyro's tests, so they come from the
    repository that the installed package names as its source, at the tag of the installed release.

    Raises:
        NoSource: There is neither a checkout nor a repository that answers.
    """
    given = os.environ.get(SOURCE)
    source = Path(given).expanduser().resolve() if given else _clone()
    if (source / "tests").is_dir():
        shutil.copytree(source / "tests", target / "tests")
        shutil.copy(source / "setup.cfg", target)
    else:
        _extract(source, target)
    if not (target / "tests" / "optim").is_dir():
        raise NoSource(f"{source} has no folder tests/optim: {SOURCE} must name a checkout of Pyro or its repository")


def replace_inference(tests: Path) -> list[Path]:
    """Changes `pyro.optim` and `pyro.infer.SVI` below `tests` to distopt's, as a user would; returns the changed files.

    Pyro's library keeps its own, so that its checks of types meet ours.
    """
    changed = []
    for path in sorted(tests.rglob("*.py")):
        text = path.read_text()
        replaced = _MEMBER.sub(r"\1from distopt import optim", _MODULE.sub("distopt.optim", _import_svi(text)))
        replaced = _SVI.sub("distopt.infer.SVI", replaced)
        if replaced != text:
            # A file that says `pyro.optim.Adam` after `import pyro` alone has to import what it now names.
            path.write_text(f"import distopt.infer\nimport distopt.optim\n{replaced}")
            changed.append(path)
    return changed


def _import_svi(text: str) -> str:
    """Adds our SVI under the same name below each import of Pyro's from `pyro.infer`."""
    lines = text.splitlines(keepends=True)
    for node in sorted(ast.walk(ast.parse(text)), key=lambda each: getattr(each, "lineno", 0), reverse=True):
        if not isinstance(node, ast.ImportFrom) or node.module not in ("pyro.infer", "pyro.infer.svi"):
            continue
        for imported in node.names:
            if imported.name == "SVI":
                name = imported.asname or "SVI"
                lines.insert(node.end_lineno or 0, f"{' ' * node.col_offset}from distopt.infer import SVI as {name}\n")
    return "".join(lines)


def _clone() -> Path:
    """Returns a clone of Pyro's repository at the installed release, kept in the user's cache."""
    release = version("pyro-ppl")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distopt" / f"pyro-{release}"
    if cache.is_dir():
        return cache
    urls = dict(each.split(", ", 1) for each in metadata("pyro-ppl").get_all("Project-URL") or [])
    if "Source" not in urls:
        raise NoSource(f"the installed pyro-ppl {release} names no repository; set {SOURCE} to a checkout of Pyro")
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", release, urls["Source"], str(partial)]
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=CLONE_S, env=os.environ | {"LC_ALL": "C"}
        )
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise NoSource(f"Pyro {release} cannot be cloned ({cause}); set {SOURCE} to a checkout of Pyro") from None
    partial.rename(cache)
    return cache


def _extract(repository: Path, target: Path) -> None:
    """Writes the tests of a git repository, bare or not: of the installed release, else of its newest commit."""
    release = version("pyro-ppl")
    for revision in (release, "HEAD"):
        archive = subprocess.run(["git", "-C", str(repository), "archive", revision, *TREE], capture_output=True)
        if archive.returncode == 0:
            with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
                tar.extractall(target, filter="data")
            return
    raise NoSource(f"{repository}: {archive.stderr.decode().strip()}")

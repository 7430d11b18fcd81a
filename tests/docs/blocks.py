"""Runs what a reader can copy: every fenced block of README and docs, and the tutorials.

A page is run from top to bottom, in a folder of its own, as a reader would:

    python            in one namespace for the page
    python NAME.py    written to the folder, and imported
    yaml [NAME.yaml]  through the configuration; what has no `name:` is a part, and is put into a small run. A file with
                      `run:` is a sweep
    console           each line that begins with `$ ` is a command; what is printed must match the lines below it, in
                      which `...` stands for anything
    text, {directive} shows something, and is not run

A block that is not run says why in a comment above it: `<!-- skip: next "why" -->`. `python -m tests.docs.blocks`
prints how many are run, and why the others are not.
"""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

from sybil import Document, Example, Sybil
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.region import Region

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "docker/kubernetes/README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
    if path.exists()
)
TUTORIALS = tuple(sorted((ROOT / "docs/tutorials").glob("*.py")))
SHOWN = ("text", "math")  # no code
LOOKS_LIKE_A_COMMAND = re.compile(
    r"^(\$ |(pip|make|python|torchrun|mpirun) [\w./-]+|distopt [\w ]*[\w-]+\.yaml)", re.MULTILINE
)
SMALL_RUN = {"name": "run", "task": "distopt.examples.ppca:Components"}
COMMAND_TIMEOUT_S = 150


class BlockError(AssertionError):
    """A block is wrong; the message says where and how."""


def run_python(example: Example, name: str) -> str | None:
    """Runs a block in the page's namespace, or as a file of the page."""
    namespace = example.namespace
    if name:
        write_file(example, name)
        namespace = {"__name__": Path(name).stem, "__file__": name}
    code = compile("\n" * example.line + example.region.lexemes["source"], example.path, "exec", dont_inherit=True)
    exec(code, namespace)
    return None


def run_yaml(example: Example, name: str) -> str | None:
    """Loads a block as a configuration."""
    import yaml

    from distopt.config import parse_config
    from distopt.config.sweep_schema import load_sweep

    text = example.region.lexemes["source"]
    if name:
        write_file(example, name)
    values = yaml.safe_load(text)
    if name and "run" in values:
        load_sweep(folder_of(example) / name)
        return None
    what_runs = {} if {"task", "script"} & set(values) else {"task": SMALL_RUN["task"]}
    parse_config(text if "name" in values else yaml.safe_dump({"name": SMALL_RUN["name"], **what_runs, **values}))
    return None


def run_console(example: Example, _name: str) -> str | None:
    """Runs the commands of a block and compares what they print."""
    folder = folder_of(example)
    commands = re.split(r"^\$ ", example.region.lexemes["source"], flags=re.MULTILINE)[1:]
    if not commands:
        return "no line begins with `$ `; a script is `sh`, output alone is `text`"
    for command in commands:
        line, _, expected = command.partition("\n")
        while line.endswith("\\"):
            more, _, expected = expected.partition("\n")
            line = f"{line}\n{more}"
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=folder,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "130"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        wanted = expected.strip()
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if done.returncode != 0 and "exit status" not in wanted:
            return f"`{line}` ended with exit status {done.returncode}:\n{done.stdout}"
        if wanted and not doctest.OutputChecker().check_output(f"{wanted}\n", f"{done.stdout.strip()}\n", options):
            return f"`{line}` printed\n{done.stdout}\nand not\n{wanted}"
    return None


def write_file(example: Example, name: str) -> None:
    (folder_of(example) / name).write_text(example.region.lexemes["source"])


def folder_of(example: Example) -> Path:
    """Returns the page's folder, with the configurations that ship."""
    return Path(example.document.namespace["__folder__"])


KINDS: dict[str, Callable[[Example, str], str | None]] = {
    "python": run_python,
    "yaml": run_yaml,
    "console": run_console,
}


def run_block(example: Example) -> str | None:
    """Runs a block by its kind; a kind that nobody knows is an error."""
    kind, _, name = example.region.lexemes["info"].strip().partition(" ")
    return KINDS[kind](example, name)


def fences(document: Document) -> Iterator[Region]:
    """Yields the fenced blocks of a page that are code; each kind of them is run, or its comment says why not."""
    lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<info>[^\n]*)\n"))
    for region in lexer(document):
        kind = region.lexemes["info"].strip().partition(" ")[0]
        is_command = LOOKS_LIKE_A_COMMAND.search(region.lexemes["source"]) is not None
        if kind.startswith("{") or (kind in SHOWN and not is_command):
            continue
        region.parsed = region.lexemes["source"]
        region.evaluator = run_block if kind in KINDS else refuse
        yield region


def refuse(example: Example) -> str | None:
    """Refuses a block of a kind that is not run."""
    info = example.region.lexemes["info"].strip()
    known = ", ".join([*KINDS, *SHOWN])
    return f'found a block of {info!r}, expected one of {known}, or a reason above it: <!-- skip: next "why" -->'


def run_page(path: Path, folder: Path | None) -> Counter[str]:
    """Runs the blocks of a page from top to bottom.

    Args:
        path: The page.
        folder: Where it is run; None runs nothing, and finds out what would be run.

    Returns:
        The number of blocks by what became of them: `run`, or line and reason of each that was not.

    Raises:
        BlockError: Blocks are wrong; the message names all of them.
    """
    document = Sybil([fences, SkipParser()]).parse(path)
    if folder is not None:
        shutil.copytree(ROOT / "configs", folder / "configs", dirs_exist_ok=True)
        document.namespace.update({"__name__": "__main__", "__folder__": str(folder)})
    results: Counter[str] = Counter()
    wrong: list[str] = []

    for example in document.examples():
        where = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{example.line}"
        if not is_block(example) and example.parsed[0] != "end" and not example.parsed[1]:
            wrong.append(f'{where}: not run, and no reason says why: <!-- skip: next "why" -->')
        if folder is None and is_block(example):
            example.region.evaluator = lambda _example: None
        try:
            example.evaluate()
        except SkipTest as reason:
            results[f"{where}: {reason}"] += 1
        except Exception as error:
            wrong.append(f"{where}: {type(error).__name__}: {error}")
        else:
            results["run"] += is_block(example)
    if wrong:
        raise BlockError("\n".join(wrong))
    return results


def run_tutorial(path: Path) -> dict[str, Any]:
    """Runs a tutorial as a script, in this process; returns its names."""
    spec = importlib.util.spec_from_file_location("__main__", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def is_block(example: Example) -> bool:
    return bool(example.region.lexemes) and "info" in example.region.lexemes


def summary() -> str:
    """Returns the numbers in one line."""
    counts = [run_page(path, None) for path in PAGES]
    run = sum(count["run"] for count in counts)
    skipped = sum(count.total() - count["run"] for count in counts)
    blocks = f"{run} blocks of README and docs run, {skipped} not run for a reason that stands above them"
    return f"{blocks}; {len(TUTORIALS)} tutorials run"


if __name__ == "__main__":
    for page in PAGES:
        for reason in sorted(run_page(page, None).keys() - {"run"}):
            print(reason)
    print(summary())

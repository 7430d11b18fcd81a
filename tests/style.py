"""The page: sizes, names, comments and blank lines of the code, held where CONTRIBUTING.md says they are.

`python -m tests.style [PATH ...]` lists what `test_style.py` refuses, for the files below the paths.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION_LINES = 50  # without its docstring
MAX_CLASS_LINES = 300
LONG_FUNCTION_LINES = 15
MIN_BLANK_SHARE = 0.05  # of the lines of long functions
MIN_COMMENT_WORDS = 30  # per 100 lines
MIN_TESTED_SHARE = 0.60

DIALECT = frozenset(
    "place places placed part parts own said told heard brought news word words found noise mend engine guard".split()
)
"""Words that are the name of no thing here, alone or within a longer name; each has a word of the field instead."""

NOT_OURS = {
    ("distopt/optim/multi.py", "parts"),  # an argument of pyro.optim.MixedMultiOptimizer
    ("distopt/optim/distributed/wrappers.py", "noise"),  # as that of DistributedOptimizer
    ("distopt/optim/distributed/optimizer.py", "noise"),  # the policy: independent or shared noise, as papers say
    ("distopt/config/schema.py", "noise"),
    ("distopt/lightning/strategy.py", "noise"),
    ("distopt/rng.py", "NoisePolicy"),
    ("tests/infer/capture/test_captured_svi.py", "noise"),
    *(
        (f"tests/{folder}", name) for folder in ("docker", "kubernetes") for name in ("engine", "Engine")
    ),  # Docker's word
}
"""Names that others gave: (file or folder, name)."""

SAME_IDEA = frozenset(
    "__init__.py __main__.py base.py cli.py errors.py platform.py job.py horovod.py mpi.py multi.py".split()
)
"""Files of one name that hold the same idea of different packages."""


@cache
def sources() -> tuple[Path, ...]:
    """Returns the Python files of `distopt` and `launch`."""
    return tuple(sorted(path for folder in ("distopt", "launch") for path in (ROOT / folder).rglob("*.py")))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def files_of_tests() -> tuple[Path, ...]:
    """Returns the Python files below `tests`, but for this one and its test, which speak of what they refuse."""
    return tuple(sorted(path for path in (ROOT / "tests").rglob("*.py") if not path.name.endswith("style.py")))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def first_line(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the first line of the body behind the docstring, counted from 1."""
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and len(body) > 1:
        return body[0].end_lineno + 1
    return body[0].lineno


def names_bound(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of everything that the file gives a name to."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def words_of(name: str) -> list[str]:
    """Returns the words that a name is made of, in lower case; what happens in place, as torch says, is one word."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    return separated.replace("in_place", "inplace").strip("_").split("_")


def is_sentence(name: str) -> bool:
    """Returns whether a name is that of a test, or of what it runs on each rank: those are sentences."""
    return name.startswith(("test_", "_run_"))


def dialect(path: Path) -> list[str]:
    not_ours = {name for file, name in NOT_OURS if file == short(path) or short(path).startswith(f"{file}/")}
    return [
        f"{short(path)}:{line}: {name}"
        for line, name in names_bound(path)
        if set(words_of(name)) & DIALECT and name not in not_ours and not is_sentence(name)
    ]


def too_long(path: Path) -> list[str]:
    refused = []
    for function in functions(path):
        size = function.end_lineno - first_line(function) + 1
        if size > MAX_FUNCTION_LINES:
            refused.append(f"{short(path)}:{function.lineno}: {function.name} has {size} lines")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno + 1 > MAX_CLASS_LINES:
            refused.append(f"{short(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    return refused


def double_assignments(path: Path) -> list[str]:
    """Lists `self.a, self.b = a, b`: one assignment a line reads better."""
    return [
        f"{short(path)}:{node.lineno}: {ast.unparse(node.targets[0])}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if all(isinstance(each, ast.Attribute) for each in node.targets[0].elts)
    ]


def blank_lines(path: Path) -> tuple[int, int]:
    """Returns (blank lines, lines) of the long functions, without their docstrings."""
    lines, blank, total = path.read_text().split("\n"), 0, 0
    for function in functions(path):
        body = lines[first_line(function) - 1 : function.end_lineno]
        if len(body) >= LONG_FUNCTION_LINES:
            blank += sum(not line.strip() for line in body)
            total += len(body)
    return blank, total


def comment_words(path: Path) -> tuple[int, int]:
    """Returns (words of comments, lines of the file)."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    prose = [comment for comment in comments if not re.match(r"#\s*(type|noqa|fmt):", comment)]
    return sum(len(comment.lstrip("#").split()) for comment in prose), text.count("\n")


def modules_by_test() -> tuple[list[str], list[str]]:
    """Returns the modules that have a test file of their name, and those that have none."""
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    modules = [path for path in sources() if not path.name.startswith("__") and "examples" not in path.parts]
    with_test = [
        short(path)
        for path in modules
        if f"test_{path.name}" in tests or f"test_{path.parent.name}_{path.name}" in tests
    ]
    return with_test, [short(path) for path in modules if short(path) not in with_test]


def main(paths: list[str]) -> None:
    """Prints what the files below `paths` still have to change, and their figures."""
    roots = [ROOT / path for path in paths] or [ROOT]
    chosen = [path for path in sources() if any(path == root or root in path.parents for root in roots)]
    for path in chosen:
        for find in (dialect, too_long, double_assignments):
            print(*find(path), sep="\n", end="\n" if find(path) else "")
    for path in files_of_tests():
        if any(path == root or root in path.parents for root in roots):
            print(*dialect(path), sep="\n", end="\n" if dialect(path) else "")
    if not chosen:
        return
    blank, total = map(sum, zip(*map(blank_lines, chosen), strict=True))
    words, lines = map(sum, zip(*map(comment_words, chosen), strict=True))
    _, without = modules_by_test()
    print(f"{blank / max(total, 1):.1%} blank lines in long functions (needs {MIN_BLANK_SHARE:.0%})")
    print(f"{100 * words / max(lines, 1):.0f} words of comment per 100 lines (needs {MIN_COMMENT_WORDS})")
    print("without a test file of their name:", ", ".join(name for name in without if ROOT / name in chosen) or "none")


if __name__ == "__main__":
    main(sys.argv[1:])

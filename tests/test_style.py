"""Sizes, names, comments, blank lines and test files of the code are as `style.py` says."""

from __future__ import annotations

import ast
from collections import defaultdict

import pytest

from tests.style import (
    MIN_BLANK_SHARE,
    MIN_COMMENT_WORDS,
    MIN_TESTED_SHARE,
    SAME_IDEA,
    blank_lines,
    comment_words,
    dialect,
    double_assignments,
    files_of_tests,
    modules_by_test,
    short,
    sources,
    too_long,
    tree_of,
)


@pytest.mark.parametrize("find", [dialect, too_long, double_assignments], ids=lambda find: find.__name__)
def test_no_source_file_holds(find):
    refused = [line for path in sources() for line in find(path)]
    assert not refused, "\n".join([f"{len(refused)} lines:", *refused[:40]])


def test_names_in_tests_are_the_fields_words_too():
    refused = [line for path in files_of_tests() for line in dialect(path)]
    assert not refused, "\n".join([f"{len(refused)} names:", *refused[:40]])


def test_long_functions_have_paragraphs():
    counts = [blank_lines(path) for path in sources()]
    share = sum(blank for blank, _ in counts) / sum(total for _, total in counts)
    assert share >= MIN_BLANK_SHARE, f"{share:.1%} blank lines"


def test_comments_say_why():
    counts = [comment_words(path) for path in sources()]
    words = 100 * sum(each for each, _ in counts) / sum(lines for _, lines in counts)
    assert words >= MIN_COMMENT_WORDS, f"{words:.0f} words of comment per 100 lines"


def test_public_classes_and_files_have_names_of_their_own():
    classes, files = defaultdict(list), defaultdict(list)
    for path in sources():
        files[path.name].append(short(path))
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(short(path))
    twice = {name: homes for name, homes in classes.items() if len(homes) > 1}
    twice |= {name: homes for name, homes in files.items() if len(homes) > 1 and name not in SAME_IDEA}
    assert not twice


def test_public_functions_have_names_of_their_own():
    homes = defaultdict(list)
    for path in sources():
        for node in tree_of(path).body:
            # A command of the terminal is called as people type it, whatever else is called so.
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and path.name != "cli.py":
                homes[node.name].append(short(path))
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1 and name != "main"}
    assert not twice


def test_modules_have_the_test_file_of_their_name():
    with_test, without = modules_by_test()
    share = len(with_test) / (len(with_test) + len(without))
    assert share >= MIN_TESTED_SHARE, f"{share:.0%}; without: {', '.join(without)}"

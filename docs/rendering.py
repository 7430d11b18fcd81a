"""How docstrings, which are Markdown in Google's sections, and formulas are shown; neither needs a network."""

from __future__ import annotations

import re
from typing import Any

import jupytext
from docutils import nodes
from latex2mathml.converter import convert
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# `name` in a docstring is code. reStructuredText wants two backticks for that, and a space or punctuation behind them;
# `\ ` separates what follows without being shown. Roles such as :math:`x` and literals in two backticks stay.
_CODE = re.compile(r"(?<![`:\w])`([^`\n]+(?:\n[^`\n]+)?)`(?!`)(\w)?")


def as_restructured_text(line: str) -> str:
    """Returns text with its code as reStructuredText writes it."""

    def replace(match: re.Match[str]) -> str:
        following = rf"\ {match[2]}" if match[2] else ""
        return f"``{match[1]}``{following}"

    return _CODE.sub(replace, line)


def convert_docstring(_app: Sphinx, _what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Rewrites the docstrings of distopt in place; those of torch and Pyro are reStructuredText already."""
    if not name.startswith("distopt"):
        return
    text = as_restructured_text("\n".join(lines))
    text = re.sub(r"(?<=\w\()\*(?=\w)|(?<=, )\*{1,2}(?=\w)", r"\\\g<0>", text)  # `f(*args)` is no emphasis
    lines[:] = text.split("\n")


def as_mathml(source: str, display: str = "inline") -> str:
    """Returns a formula as MathML, which browsers show by themselves.

    Raises:
        ExtensionError: The formula is none that latex2mathml knows.
    """
    try:
        return str(convert(source, display=display))
    except Exception as error:
        raise ExtensionError(f"{source!r} cannot be shown as a formula: {error!r}") from error


def visit_math(translator: Any, node: nodes.math) -> None:
    """Writes an inline formula."""
    translator.body.append(as_mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    r"""Writes a displayed formula; `\\` and `&` make a table of several lines."""
    source = node.astext()
    if r"\\" in source and r"\begin" not in source:
        source = rf"\begin{{aligned}}{source}\end{{aligned}}"
    translator.body.append(f'<div class="math">{as_mathml(source, "block")}</div>')
    raise nodes.SkipNode


def read_tutorial(text: str) -> NotebookNode:
    """Returns the notebook of a Python file in cells, which need not say that it is Python."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the above with Sphinx."""
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)  # before napoleon reads the sections
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

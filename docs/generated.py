"""Pages that are made from the code while the documentation is built, so that they cannot differ from it.

A page says `<!-- generated: NAME -->` where the text of the function NAME below belongs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import typer
from sphinx.application import Sphinx

from distopt.checkpoint.cli import app as checkpoint_app
from distopt.config import MAY_CHANGE, all_keys
from distopt.launch.cli import app
from distopt.launchers import LAUNCHERS

_ERROR_MODULES = (
    "distopt.backends.base",
    "distopt.checkpoint.errors",
    "distopt.checkpoint.storage.base",
    "distopt.config.base",
    "distopt.constraints",
    "distopt.launch.jobs",
    "distopt.launch.run_dir",
    "distopt.launch.runs",
    "distopt.launchers",
    "distopt.reduce.errors",
    "distopt.scvi.same",
    "distopt.sharding",
    "distopt.train.serve",
    "distopt.train.task",
)
_INCLUDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "docker/kubernetes/README.md": "how-to/kubernetes.md",
}
MANY = 7  # so many choices are listed at the end of the page
_NAMED_FILE = re.compile(r"^```(python|yaml) (\S+\.\w+)$", re.MULTILINE)
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns a table in Markdown."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Returns text as code; nothing for none."""
    return f"`{text}`" if text else ""


def yaml_keys() -> str:
    """Returns every key of the YAML, with a heading for each section."""
    pages: dict[str, list[str]] = {}
    intros = {"": "Keys at the top level."}
    for key in all_keys():
        if key.is_section:
            intros[key.name] = key.text
            continue
        section = key.name.rpartition(".")[0]
        while section not in intros:  # what a list or an optional mapping holds stands with it
            section = section.rpartition(".")[0]
        kind = (
            key.type if key.type.count(" or ") < MANY else f"one of the [names below](#names-for-{_anchor(key.name)})"
        )
        facts = (
            kind + (f", in {key.unit}" if key.unit else ""),
            "required" if key.default is None else f"default {code(key.default)}",
            f"for example {code(f'{_last(key.name)}: {key.example}')}",
        )
        pages.setdefault(section, []).append(f"{code(key.name)}\n: {key.text}\n\n  {'; '.join(facts)}")
    parts = []
    for section, entries in pages.items():
        parts += [f"## `{section}`" if section else "## Top level", intros[section], *entries]
    return "\n\n".join([*parts, *_choices()])


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _anchor(name: str) -> str:
    return name.replace(".", "").lower()


def _choices() -> Iterator[str]:
    """Yields the long lists of names that keys may have."""
    for key in all_keys():
        if key.type.count(" or ") >= MANY:
            yield f"## Names for `{key.name}`"
            yield ", ".join(key.type.split(" or "))


def commands() -> str:
    """Returns every command with its arguments and options, as `--help` has them."""
    parts = []
    for name, command in _commands(typer.main.get_command(app), "distopt"):
        help_text = re.sub(r"\s*\n\s*", " ", (command.help or "").strip().replace("\n\n", "\0")).replace("\0", "\n\n")
        rows = [
            [code(_usage(param)), (param.help or "").replace("\n", " "), _default(param)]
            for param in command.params
            if param.name != "help"
        ]
        parts += [f"## `{name}`", help_text]
        if rows:
            parts.append(table(("argument or option", "meaning", "default"), rows))
    return "\n\n".join(parts)


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    if name == "distopt checkpoint":  # it hands its arguments on, so that other commands need not import it
        group = typer.main.get_command(checkpoint_app)
    if not hasattr(group, "commands"):
        yield name, group
        return
    if group.params:
        yield name, group
    for each, command in group.commands.items():
        yield from _commands(command, f"{name} {each}")


def _usage(param: Any) -> str:
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    value = "" if param.is_flag else f" {param.metavar or param.name.upper()}"
    return ", ".join(param.opts) + value


def _default(param: Any) -> str:
    if param.required:
        return "required"
    return "" if param.default in (None, False, "") or param.param_type_name == "argument" else code(str(param.default))


def launchers() -> str:
    """Returns the table of launchers and their variables."""
    rows = (
        [
            each.name,
            ", ".join(map(code, each.markers)),
            code(each.rank),
            code(each.world_size),
            code(each.local_rank or ""),
            code(each.node_rank or ""),
            code(each.backend),
        ]
        for each in LAUNCHERS
    )
    return table(("launcher", "marks", "rank", "world size", "local rank", "node rank", "backend"), rows)


def prometheus() -> str:
    """Returns what `/metrics` answers, from the collector that answers it."""
    from distopt.train.serve import _Collector

    class Everything(SimpleNamespace):
        def __getattr__(self, name: str) -> float:
            return 1.0

    status = Everything(checkpoint_age_s=lambda: 1.0)
    kinds = {"counter": "_total"}  # what the text format adds
    rows = (
        [code(family.name + kinds.get(family.type, "")), family.type, family.documentation]
        for family in _Collector(status).collect()  # type: ignore[arg-type]
    )
    return table(("name", "type", "meaning"), rows)


def may_change() -> str:
    """Returns the keys that may differ when a run resumes, and those that may not."""
    kept = [key.name for key in all_keys() if not key.is_section and "[]" not in key.name and "*" not in key.name]
    fixed = [name for name in kept if not any(f"{name}.".startswith(f"{free}.") for free in MAY_CHANGE)]
    free = ", ".join(map(code, MAY_CHANGE))
    return f"These keys may differ, with all below them: {free}.\n\nThese may not: {', '.join(map(code, fixed))}."


def errors() -> str:
    """Returns the exceptions of distopt with the sentence that each has."""
    rows = []
    for error in sorted(_exceptions(), key=lambda each: each.__qualname__):
        base = error.__mro__[1]
        rows.append(
            [code(error.__name__), code(base.__name__), code(error.__module__), (error.__doc__ or "").split("\n")[0]]
        )
    return table(("error", "is a", "defined in", "meaning"), rows)


def _exceptions() -> set[type[BaseException]]:
    """Returns the exceptions that the packages of distopt define and that leave their modules."""
    return {
        value
        for module in map(import_module, _ERROR_MODULES)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, BaseException) and value.__module__.startswith("distopt")
        if not name.startswith("_")
    }


def other_pages() -> str:
    """Returns the pages that no list of pages has, so that a new one is never out of reach."""
    folder = Path(__file__).parent
    lists = [folder / "index.md", *folder.glob("*/index.md")]
    listed = {line.removeprefix("../") for page in lists for line in page.read_text().splitlines()}
    new = sorted(path.stem for path in folder.glob("*.md") if path.stem != "index" and path.stem not in listed)
    return "\n".join(["```{toctree}", ":hidden:", "", *new, "```"]) if new else ""


_FUNCTIONS = (yaml_keys, commands, launchers, prometheus, may_change, errors, other_pages)
PAGES: dict[str, Callable[[], str]] = {page.__name__: page for page in _FUNCTIONS}


def insert_generated(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Replaces the marks of a page, shows the names of its files, and leads links to files to their pages."""
    source[0] = _NAMED_FILE.sub(r"```{code-block} \1\n:caption: \2\n", source[0])
    for file, page in _INCLUDED.items():
        source[0] = re.sub(rf"\]\((?:\.\./)+{re.escape(file)}", f"](/{page}", source[0])
    source[0] = _MARK.sub(lambda match: PAGES[match[1]](), source[0])


def setup(sphinx: Sphinx) -> dict[str, Any]:
    """Registers the above with Sphinx."""
    sphinx.connect("source-read", insert_generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Help in colour on a terminal, by a formatter of a few lines: importing rich would take half of the start-up time."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import typer


def with_colored_help(app: typer.Typer) -> Any:
    """Returns the command of an app, whose help has bold headings and coloured names.

    What is written to a file or a pipe is plain, and so is all help where `NO_COLOR` is set, or `TERM` is `dumb`, as in
    a shell of Emacs.
    """
    command: Any = typer.main.get_command(app)
    if not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        _color(command)
    return command


def _color(command: Any) -> None:
    # The classes of click are found on what typer has made: it brings a click of its own since 0.25.
    context: type[Any] = command.context_class
    formatter: type[Any] = context.formatter_class

    class ColoredFormatter(formatter):  # type: ignore[misc]
        def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
            super().write_usage(typer.style(prog, bold=True), args, prefix)

        def write_heading(self, heading: str) -> None:
            super().write_heading(typer.style(heading, bold=True))

        def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **kwargs: Any) -> None:
            super().write_dl([(typer.style(name, fg="cyan"), text) for name, text in rows], *args, **kwargs)

    class ColoredContext(context):  # type: ignore[misc]
        formatter_class = ColoredFormatter

    command.context_class = ColoredContext
    for subcommand in getattr(command, "commands", {}).values():
        _color(subcommand)

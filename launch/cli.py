"""The command `distopt`. It answers at once: what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distopt.config import RunConfig

app = typer.Typer(
    name="distopt",
    help="Distributed training for Pyro models: one YAML, every platform.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich alone would take half of the start-up time
)
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to replace, such as train.num_steps=10.")
]
USAGE_ERROR = 2


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every command and file, and touch nothing.")
    ] = False,
) -> None:
    """Check a run, start it on its platform and follow it to its end; its exit status is the run's."""
    from . import checks
    from .follow import follow
    from .platforms import platform
    from .run_directory import RunDirectoryBusy, submission

    run = _load(config, overrides)
    chosen = platform(run.launch.platform)
    problems = checks.problems(run, chosen)
    if problems:
        _refuse([f"{config}: {problem}" for problem in problems])
    plan = chosen.plan(run)
    if dry_run:
        typer.echo(str(plan), nl=False)
        return
    try:
        with submission(run, plan):
            status = follow(plan, run.run_dir, run.launch.grace_s)
    except RunDirectoryBusy as error:
        _refuse([f"{config}: {error}"])
    raise typer.Exit(status)


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Run one worker: what an engine starts once per rank, and a lone process without one."""
    from .processes import die_with_parent

    if _has_engine():
        die_with_parent()
    run = _load(config, overrides)
    from distopt import train as training  # imports torch

    raise typer.Exit(training.run(run))


def _has_engine() -> bool:
    import os

    from .guard import ENGINES

    return any(rank in os.environ and size in os.environ for rank, size in ENGINES)


def _load(path: str, overrides: list[str] | None) -> RunConfig:
    from distopt.config import ConfigError, load_config

    try:
        return load_config(path, overrides or ())
    except ConfigError as error:
        _refuse(error.problems)
        raise  # not reached


def _refuse(problems: list[str]) -> None:
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(USAGE_ERROR)


@app.command(
    "checkpoint",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def checkpoint(context: typer.Context) -> None:
    """List, verify and inspect the checkpoints of a run."""
    from importlib import import_module

    subcommands: typer.Typer = import_module("distopt.checkpoint.cli").app
    subcommands(args=context.args, prog_name="distopt checkpoint")


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())

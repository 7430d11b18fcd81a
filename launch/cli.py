"""The command `distopt`. It answers at once: what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, NoReturn

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
config_app = typer.Typer(
    help="The resolved YAML, its schema, and what differs from a run's.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to replace, such as train.num_steps=10.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the name of one in runs/.")]
AllRanks = Annotated[
    bool, typer.Option("--all-ranks", help="Show the output of all ranks, each line with its rank's number.")
]
USAGE_ERROR = 2


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every command and file, and touch nothing.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Start the run and leave it.")] = False,
    all_ranks: AllRanks = False,
) -> None:
    """Start a run and follow it to its end.

    It is checked first, and refused with status 2 when it cannot run. Ctrl-C has it save and end. The exit status is
    the run's: 0 done, 130 or 143 stopped by Ctrl-C or SIGTERM with a checkpoint written, 1 failed.
    """
    from . import checks, runs
    from .findings import failures
    from .platforms import load_platform

    run = _load(config, overrides)
    try:
        platform = load_platform(run.launch.platform)
        findings = checks.check(run, platform)
        if refused := failures(findings):
            _refuse([f"{config}: {finding}" for finding in refused])
        for finding in findings:
            typer.echo(f"{config}: warning: {finding}", err=True)

        plan = platform.plan(run)
        if dry_run:
            typer.echo(str(plan), nl=False)
            return
        status = runs.start(run, platform, plan, detach=detach, ranks=platform.ranks(run) if all_ranks else (0,))
    except (*runs.ERRORS, runs.LaunchRefused) as error:
        _refuse([f"{config}: {error}"])
    raise typer.Exit(status)


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Run one worker, as engines do.

    An engine starts it once per rank; without one it is a world of its own.
    """
    from distopt.launchers import find_launcher

    from .worker.processes import die_with_parent

    if find_launcher() is not None:
        die_with_parent()
    run = _load(config, overrides)
    from distopt import train as training  # imports torch

    raise typer.Exit(training.run(run))


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; all in runs/ without one.")] = None,
) -> None:
    """Ask how runs are.

    Each line has a run directory, its state (pending, running, stopped, done, failed or unknown) and what its engine
    says about it.
    """
    from . import runs

    try:
        directories = [runs.find(run)] if run is not None else runs.all_runs()
    except runs.ERRORS as error:
        _refuse([str(error)])
    if not directories:
        typer.echo("no run was launched from here (none in runs/)", err=True)
    for directory in directories:
        try:
            state = runs.job_of(directory).state()
            typer.echo(f"{directory}\t{state.phase}\t{state.detail}")
        except runs.ERRORS as error:
            typer.echo(f"{directory}\tunknown\t{error}")


@app.command()
def logs(
    run: Run,
    rank: Annotated[
        int, typer.Option(metavar="RANK", help="Whose output; on Kubernetes the number of a node.", min=0)
    ] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    all_ranks: AllRanks = False,
) -> None:
    """Print what a rank has printed.

    A line of dashes begins each attempt, in the order of time.
    """
    from . import runs
    from .platforms import load_platform

    try:
        directory = runs.find(run)
        recorded = runs.recorded_config(directory)
        ranks = load_platform(recorded.launch.platform).ranks(recorded)
        if rank not in ranks:
            _refuse([f"--rank: found {rank}, but the run has {ranks.start} to {ranks.stop - 1}"])
        runs.print_logs(runs.job_of(directory), ranks if all_ranks else (rank,), until_end=follow)
    except runs.ERRORS as error:
        _refuse([str(error)])


@app.command()
def stop(run: Run) -> None:
    """Have a run save and end, and wait for it.

    What has not ended after the grace time (launch.grace_s) is killed. A run that has ended stays as it is; on
    Kubernetes its objects are deleted, so that its name is free again.
    """
    from . import runs

    try:
        state = runs.stop(runs.find(run))
    except runs.ERRORS as error:
        _refuse([str(error)])
    typer.echo(f"{state.phase}\t{state.detail}")


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="A run, whose hosts are looked at too.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Look for what would keep runs from working.

    At what is installed here, and at the hosts, the port and the folder of a run; each line is ok, a warning or a
    failure with the command that mends it. Exit status 1 when there is a failure.
    """
    from . import doctor as physician

    run = _load(config, overrides) if config is not None else None
    raise typer.Exit(physician.print_findings(run, as_json=as_json, echo=typer.echo))


@config_app.command()
def show(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved YAML, with all defaults."""
    from distopt.config import dump_yaml

    typer.echo(dump_yaml(_load(config, overrides)), nl=False)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of the YAML.

    Editors check and complete the file by it.
    """
    import json

    from distopt.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@config_app.command()
def diff(config: Config, run: Run, overrides: Overrides = None) -> None:
    """Print what differs from a run's YAML.

    Exit status 1 when something does.
    """
    from distopt.config import differences

    from . import runs

    now = _load(config, overrides).model_dump(mode="json")
    try:
        before = runs.recorded_config(runs.find(run)).model_dump(mode="json")
    except runs.ERRORS as error:
        _refuse([str(error)])
    found = list(differences(before, now))
    for key, old, new in found:
        typer.echo(f"{key}: {old!r} there, {new!r} now")
    raise typer.Exit(int(bool(found)))


@app.command(
    "checkpoint",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def checkpoint(context: typer.Context) -> None:
    """List, verify and inspect the checkpoints of a run."""
    from importlib import import_module

    subcommands: typer.Typer = import_module("distopt.checkpoint.cli").app
    subcommands(args=context.args, prog_name="distopt checkpoint")


def _load(path: str, overrides: list[str] | None) -> RunConfig:
    import os

    from distopt.config import ConfigError, load_config, parse_config

    try:
        if path.startswith("@"):  # a pod gets its configuration in a variable
            return parse_config(os.environ.get(path[1:], ""), overrides or (), source=path)
        return load_config(path, overrides or ())
    except ConfigError as error:
        _refuse(error.problems)


def _refuse(problems: list[str]) -> NoReturn:
    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(USAGE_ERROR)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(app())

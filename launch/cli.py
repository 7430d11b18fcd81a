"""The command `distopt`.

What a command needs is imported within its function: `distopt --help` must answer at once, and the configuration
alone takes several times as long to import as typer.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeGuard

import typer

from .colored_help import with_colored_help

if TYPE_CHECKING:
    from distopt.config import RunConfig

    from .plan import Plan

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# Without rich, importing which would take half of the start-up time; `with_colored_help` brings the colours.
app = typer.Typer(
    name="distopt",
    help="Distributed training for Pyro models: one YAML for every platform.",
    epilog="distopt launch RUN.yaml --dry-run shows what a run would do; config show RUN.yaml --explain, every key.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import distopt

        typer.echo(f"distopt {distopt.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Distributed training for Pyro models: one YAML for every platform."""


config_app = typer.Typer(
    help="Show the resolved YAML, its schema, or what changed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(config_app, name="config")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to override, such as train.num_steps=10.")
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or the name of one in runs/.")]
AllRanks = Annotated[
    bool, typer.Option("--all-ranks", help="Show the output of all ranks, each line with the number of its rank.")
]


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the commands and files without running or writing anything; nothing of the platform is needed.",
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="With --dry-run: write the files to this folder.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return as soon as the run has been started.")] = False,
    all_ranks: AllRanks = False,
) -> None:
    """Start a run and follow it to its end.

    The run is checked first and refused with exit status 2 if it cannot work. Ctrl-C stops it after a last checkpoint;
    a script is asked to stop, and saves what it wants to.
    The exit status is 0 if the run is done, 128 and the number of the signal that stopped it (130 for Ctrl-C, 143 for
    SIGTERM), 1 if it failed.
    """
    from . import checks, runs
    from .findings import failures
    from .platforms import load_platform, plan_of

    if output is not None and not dry_run:
        _refuse(["--output: found without --dry-run, which it belongs to; a run that starts writes into its run_dir"])
    run = _load(config, overrides)
    try:
        platform = load_platform(run.launch.platform)
        findings = checks.check(run, platform, dry_run=dry_run)
        if failed := failures(findings):
            _refuse([f"{config}: {finding}" for finding in failed])
        for finding in findings:
            typer.echo(f"{config}: warning: {finding}", err=True)

        plan = plan_of(platform, run)
        if dry_run:
            _show_plan(plan, output, platform.record_dir(run))
            return
        status = runs.start(run, platform, plan, detach=detach, ranks=platform.ranks(run) if all_ranks else (0,))
    except (*runs.ERRORS, runs.LaunchRefused) as error:
        _refuse([f"{config}: {error}"])
    raise typer.Exit(status)


def _show_plan(plan: Plan, output: Path | None, run_dir: Path) -> None:
    """Prints a plan, or writes its files to a folder and prints their paths."""
    from .run_dir import write_plan

    if output is None:
        typer.echo(str(plan), nl=False)
        return
    try:
        written = write_plan(plan, output, run_dir)
    except OSError as error:
        _refuse([f"--output: {error.filename or output} cannot be written: {error.strerror}"])
    for path in written:
        typer.echo(path)


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Run one worker of a run.

    Launchers such as torchrun start it once per rank. Without a launcher it trains alone.
    """
    from distopt.launchers import find_launcher

    from .worker.processes import die_with_parent
    from .worker.streams import best_effort

    if find_launcher() is not None:
        die_with_parent()
    run = _load(config, overrides, is_worker=True)
    _import_from_here()
    # What the modules of torch and Pyro make stays; to look through it again and again was a seventh of this import.
    gc.disable()
    from distopt import train as training

    gc.enable()

    with best_effort():
        status = training.run(run, until_exit=True)
    raise typer.Exit(status)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run; without it, all runs in runs/.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show a table that follows the runs.")] = False,
) -> None:
    """Show the state of runs.

    Each line has a run directory, its state (pending, running, stopped, done, failed or unknown), details from its
    platform, and how far it is: step, ELBO, speed, time left, last checkpoint. Tabs separate them.
    """
    from . import runs
    from . import status as states

    def find() -> list[Path]:
        return [runs.find(run)] if run is not None else runs.all_runs()

    try:
        directories = find()
    except runs.ERRORS as error:
        _refuse([str(error)])
    if as_json:
        typer.echo(states.as_json(directories))
        return
    if not directories:
        typer.echo("no run was launched from this folder (runs/ has none)", err=True)
    elif watch:
        states.watch(find)
    else:
        for directory in directories:
            typer.echo(states.line_of(directory))


@app.command()
def ui(
    named: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs; without any, all runs in runs/.")
    ] = None,
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.", min=0, max=65535)] = 8265,
) -> None:
    """Show runs as a page on this machine, live while they train.

    It lists runs with their state, and shows curves over each other, ranks and stragglers, checkpoints, logs and
    differences of their YAML. It only reads, listens on loopback, and ends with Ctrl-C. From another machine:
    ssh -L 8265:127.0.0.1:8265 HOST.
    """
    from . import runs
    from .ui import serve_page

    try:
        directories = [runs.find(each) for each in named or ()]
        serve_page(lambda: directories or runs.all_runs(), port, echo=typer.echo)
    except runs.ERRORS as error:
        _refuse([str(error)])
    except OSError as error:
        _refuse([f"--port: {port} cannot be used: {error.strerror}; --port 0 takes a free one"])


@app.command()
def report(run: Run) -> None:
    """Write a run's report.html anew.

    It is made of the run's newest checkpoint, also while the run trains.
    """
    _import_from_here()
    from distopt import train as training  # imports torch

    try:
        page = training.write_report(run)
    except training.RESULT_ERRORS as error:
        if _is_of_output(error):
            raise
        _refuse([str(error)])
    typer.echo(f"report: {page}")  # a reader that has gone is no error of the run


@app.command()
def compare(
    named: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Run directories, or names of runs.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The page to write.")] = "comparison.html",
) -> None:
    """Compare runs: final and best metrics, what differs in their YAML, and their curves.

    Prints the tables and writes a page with the curves over each other.
    """
    _import_from_here()
    from distopt import train as training  # imports torch

    if len(named) < 2:
        _refuse([f"found {len(named)} run, expected two or more"])
    try:
        page = training.compare_runs(named, output)
    except training.RESULT_ERRORS as error:
        if _is_of_output(error):
            raise
        _refuse([str(error)])
    typer.echo(f"comparison: {page}")  # a reader that has gone is no error of the run


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(metavar="SWEEP", help="The sweep's YAML file.")],
) -> None:
    """Run trials of one YAML with different keys: a grid, several seeds, or a search by Optuna.

    Each trial is a run, SWEEP-000, SWEEP-001, ... in runs/. The same command continues a sweep that was stopped or
    killed. At the end come a table and a page with the curves. The exit status is 1 if a trial failed.
    """
    from distopt.config.sweep_schema import load_sweep

    from . import runs
    from .sweep import Sweep

    try:
        trials = Sweep(load_sweep(config))
        status = trials.run()
    except runs.ERRORS as error:
        _refuse([str(error)])

    from distopt import train as training  # imports torch

    settings = trials.config
    rows = [(trials.run_dir(each), each.values, each.state, each.value) for each in trials.ranked()]
    page = training.write_sweep(settings.name, settings.metric, rows, trials.folder / "sweep.html")
    typer.echo(f"sweep: {page}")
    raise typer.Exit(status)


@app.command()
def logs(
    run: Run,
    rank: Annotated[
        int, typer.Option(metavar="RANK", help="The rank to show; on Kubernetes the number of a node.", min=0)
    ] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep showing new output until the run ends.")] = False,
    all_ranks: AllRanks = False,
) -> None:
    """Show a rank's output.

    Each attempt begins with a line of dashes that tells its time.
    """
    from . import runs
    from .platforms import load_platform

    try:
        directory = runs.find(run)
        recorded = runs.launched_config(directory)
        ranks = load_platform(recorded.launch.platform).ranks(recorded)
        if rank not in ranks:
            _refuse([f"--rank: found {rank}, but the run has {ranks.start} to {ranks.stop - 1}"])
        runs.print_logs(runs.job_of(directory), ranks if all_ranks else (rank,), until_end=follow)
    except runs.ERRORS as error:
        _refuse([str(error)])


@app.command()
def stop(run: Run) -> None:
    """Stop a run after a last checkpoint.

    Waits for its end, and kills what is still running after the grace time (launch.grace_s). On Kubernetes the objects
    of the run are deleted, also if it has ended, so that its name can be used again.
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
        str | None, typer.Argument(metavar="[CONFIG]", help="A run whose hosts, port and folder are checked too.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    capture: Annotated[
        bool,
        typer.Option("--capture", help="Explain what capturing the run's steps would do, in place of the checks."),
    ] = False,
) -> None:
    """Check the environment for problems.

    Checks what is installed here and whether workers reach each other. Each line is ok, a warning or a failure, with
    the command that fixes it. The exit status is 1 if there is a failure.
    """
    from .doctor import print_findings

    run = _load(config, overrides) if config is not None else None
    if capture:
        _explain_capture(run)
        return
    raise typer.Exit(print_findings(run, as_json=as_json, echo=typer.echo))


def _explain_capture(run: RunConfig | None) -> None:
    """Prints what would be captured of the steps of a run; the task is built and its first batch read, here."""
    from distopt import train as training  # imports torch
    from distopt.config import ConfigError

    if run is None:
        _refuse(["--capture needs a run to look at: distopt doctor CONFIG --capture"])
    _import_from_here()
    try:
        typer.echo(str(training.explain_run(run)))
    except (ConfigError, training.TaskError) as error:
        _refuse([str(error)])
    if run.train.capture == "off":
        typer.echo("The run takes all steps eagerly, since its train.capture is off.")


@config_app.command()
def show(
    config: Config,
    overrides: Overrides = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add to each key its meaning, type, unit and default as a comment.")
    ] = False,
) -> None:
    """Print the resolved YAML with all defaults."""
    from distopt.config import dump_yaml, explain_yaml

    write = explain_yaml if explain else dump_yaml
    typer.echo(write(_load(config, overrides)), nl=False)


@config_app.command()
def schema() -> None:
    """Print the JSON schema of the YAML.

    Editors can use it to check and complete the file.
    """
    import json

    from distopt.config import RunConfig

    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


@config_app.command()
def diff(config: Config, run: Run, overrides: Overrides = None) -> None:
    """Print what differs from a run's YAML.

    The exit status is 1 if something does.
    """
    from distopt.config import differences

    from . import runs

    now = _load(config, overrides).as_json()
    try:
        before = runs.launched_config(runs.find(run)).as_json()
    except runs.ERRORS as error:
        _refuse([str(error)])

    changes = list(differences(before, now))
    for key, old, new in changes:
        typer.echo(f"{key}: {old!r} there, {new!r} now")
    raise typer.Exit(int(bool(changes)))


@app.command(
    "checkpoint",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def checkpoint(context: typer.Context) -> None:
    """Show, verify, export and import checkpoints."""
    from importlib import import_module

    subcommands: typer.Typer = import_module("distopt.checkpoint.cli").app
    with_colored_help(subcommands)(args=context.args, prog_name="distopt checkpoint")


def _import_from_here() -> None:
    """Lets a task's module be found in the current directory, as the workers find it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _load(path: str, overrides: list[str] | None, *, is_worker: bool = False) -> RunConfig:
    from distopt.config import ConfigError, load_config, parse_config
    from distopt.worker_error import record_error

    try:
        if path.startswith("@"):  # the name of a variable, which is how a pod gets its configuration
            return parse_config(os.environ.get(path[1:], ""), overrides or (), source=path)
        return load_config(path, overrides or ())
    except ConfigError as error:
        if is_worker:  # its supervisor then knows that it would be refused again
            record_error(error, permanent=True)
        _refuse(error.problems)


def _refuse(problems: list[str]) -> NoReturn:
    from distopt.launchers import USAGE_ERROR

    for problem in problems:
        typer.echo(problem, err=True)
    raise typer.Exit(USAGE_ERROR)


def _read_names_as_utf8() -> None:
    """Starts this command again in Python's UTF-8 mode under a locale of ASCII.

    Other letters in a path are no text there that C++ libraries take, torchrun's store among them, and a module whose
    name has some is not found.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """Entry point of the console script."""
    from .worker.streams import open_standard_streams

    open_standard_streams()
    _read_names_as_utf8()
    # Ctrl-C before a run has started, or while a command only asks, needs no traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(with_colored_help(app)())
    except Exception as error:
        if _is_of_output(error):
            _end_without_output(error)
        # A defect, of distopt or of the user's code. Its traceback tells where, without the frames of typer.
        error.__traceback__ = _below_typer(error.__traceback__)
        raise


def _is_of_output(error: BaseException) -> TypeGuard[OSError]:
    """Returns whether what a command prints could not be written: an error of a file has its name."""
    return isinstance(error, OSError) and error.errno in _FULL and error.filename is None


def _end_without_output(error: OSError) -> NoReturn:
    """Ends a command whose output a disk has no room for, or a terminal that is gone does not take."""
    from contextlib import suppress

    with suppress(OSError):
        print(f"distopt: the output cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):  # Python tries once more to write the rest when it ends, and would change the exit status
        os.dup2(nowhere, fd)
    sys.exit(1)


def _below_typer(trace: TracebackType | None) -> TracebackType | None:
    """Returns a traceback from the command's own function on."""
    below = trace
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__"))
        if name.partition(".")[0] in ("typer", "click"):
            below = trace.tb_next
        trace = trace.tb_next
    return below

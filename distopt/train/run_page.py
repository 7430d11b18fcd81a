"""The pages of results: `report.html` of one run, and a comparison of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console
from torch import Tensor

from distopt.backends import current
from distopt.checkpoint import CheckpointError
from distopt.config import ConfigError, RunConfig, differences, dump_yaml
from distopt.launchers import METRICS_FILE
from distopt.rng import seed_all
from distopt.run_files import read_facts, read_metrics
from distopt.sharding import local_parameters
from distopt.train.facts import paces_of
from distopt.train.report import Report, curves_figure, elbo_figure, paces_table, params_figure, points_figure
from distopt.train.saved_run import load_run
from distopt.train.task import Task, TaskError
from distopt.train.validation import PREFIX

REPORT = "report.html"
MAX_PARAMS = 30
"""Parameters in the default table and plot."""
MAX_CURVES = 12
"""Trials whose curves a sweep's page shows."""

RESULT_ERRORS = (CheckpointError, ConfigError, TaskError, OSError)
"""What reading the results of a run raises, with a message for users."""


def report_of_loop(
    config: RunConfig, console: Console | None, task: Task | None, *, step: int, num_rows: int | None
) -> str:
    """Writes the report of a run whose loop has ended; returns a line that says where it is.

    A disk that is full ends no run that is done.

    Args:
        config: The run.
        console: Where its texts and tables are printed, too.
        task: As for `fill_report`.
        step: Steps done.
        num_rows: As for `fill_report`.
    """
    report = Report(config.name, console, read_metrics(config.run_dir))
    fill_report(report, config, task, read_facts(config.run_dir), step=step, num_rows=num_rows)

    path = config.run_dir / REPORT
    try:
        report.write(path)
    except OSError as error:
        return f"no report: {path} cannot be written: {error.strerror}"
    return f"report: {path}"


def fill_report(
    report: Report, config: RunConfig, task: Task | None, facts: Mapping[str, Any], *, step: int, num_rows: int | None
) -> None:
    """Adds all of a run's report: its results, curves, stragglers, facts and configuration; draws its own samples.

    Args:
        report: Has the history.
        config: The run.
        task: With trained parameters in Pyro's store; None for a script, whose parameters are shown.
        facts: What `run.json` says.
        step: Steps done.
        num_rows: Rows of the training set, None if they are not known.
    """
    report.text(_headline(facts, step), quiet=True)
    seed_all(config.seed, config.train.num_steps)
    with torch.no_grad():
        num_before = report.num_sections
        if task is not None:
            task.report(report)
        if report.num_sections == num_before:
            _params_section(report)

    report.heading("ELBO over steps")
    try:
        figure = elbo_figure(report.history, num_rows)
    except ImportError:
        report.text(
            f"There is no figure without matplotlib: pip install matplotlib. The numbers are in {METRICS_FILE}."
        )
    else:
        report.figure(figure, f"Evidence lower bound{'' if num_rows is None else ' per row'}, mean over the ranks.")
        _add_curves(report)

    if paces := paces_of(dict(facts)):
        paces_table(report, paces)
    _facts_section(report, config, facts, step)
    report.source("The configuration", dump_yaml(config))


def _headline(facts: Mapping[str, Any], step: int) -> str:
    began = _local_time(facts.get("began_at"))
    workers = facts.get("num_workers")
    pieces = [
        f"{step:,} steps",
        f"{workers} worker{'s' if workers != 1 else ''}" if workers else "",
        f"began {began}" if began else "",
    ]
    return ", ".join(filter(None, pieces))


def _add_curves(report: Report) -> None:
    """Adds the learning rate, and one figure for each metric of the task's validation."""
    names = list(dict.fromkeys(name for row in report.history for name in row if name.startswith(PREFIX)))
    curves = {"learning rate": "lr"} | {f"validation: {name.removeprefix(PREFIX)}": name for name in names}
    for title, name in curves.items():
        points = curve(report.history, name)
        if points:
            report.heading(title[0].upper() + title[1:])
            report.figure(curves_figure({title: points}, title), f"{title.capitalize()} at the logged steps.")


def curve(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Returns (step, value) of a logged metric where it was finite."""
    return [(row["step"], row[name]) for row in history if isinstance(row.get(name), int | float)]


def _params_section(report: Report) -> None:
    """Adds the parameters of guide and model, for a task that reports nothing itself."""
    params = {name: value.detach() for name, value in pyro.get_param_store().items()}
    shown = dict(list(params.items())[:MAX_PARAMS])
    rest = f" The first {MAX_PARAMS} of {len(params)}." if len(params) > MAX_PARAMS else ""
    rows = [[name, _shape(value), *_summary(value)] for name, value in shown.items()]
    if params.keys() & local_parameters().keys() and current().world_size > 1:
        rest += " Of sharded plates these are the datapoints of rank 0; `distopt report` writes the page with all."
    note = f"Constrained values; mean, standard deviation and range are over a parameter's elements.{rest}"
    report.table("Parameters", ["parameter", "shape", "mean", "sd", "min", "max"], rows, note)
    try:
        report.figure(params_figure(shown), "The elements of each parameter.")
    except ImportError:
        pass  # the section on the ELBO says what is missing


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "scalar"


def _summary(value: Tensor) -> list[str]:
    if not value.numel():
        return [""] * 4
    value = value.double()
    numbers = (value.mean(), value.std(correction=0), value.min(), value.max())
    return [f"{float(number):.4g}" for number in numbers]


def _facts_section(report: Report, config: RunConfig, facts: Mapping[str, Any], step: int) -> None:
    trained_s = report.history[-1].get("train_s") if report.history else None
    versions = facts.get("versions") or {}
    rows = [
        ["began", _local_time(facts.get("began_at"))],
        ["trained for", "" if trained_s is None else str(timedelta(seconds=round(trained_s)))],
        ["steps", f"{step:,} of {config.train.num_steps:,}"],
        ["ended early", str(facts.get("early_stop") or "")],
        ["best checkpoint", f"step {facts['best_step']:,}" if facts.get("best_step") else ""],
        ["starts of the workers", str(facts.get("num_starts", ""))],
        ["task", str(config.task or config.script)],
        ["seed", str(config.seed)],
        ["workers", f"{facts.get('num_workers', '')} ({facts.get('backend', '')})"],
        ["versions", ", ".join(f"{name} {version}" for name, version in versions.items())],
        ["commit", str(facts.get("commit") or "none")],
    ]
    report.table("The run", [], [row for row in rows if row[1]], printed=False)


def _local_time(text: Any) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC") if isinstance(text, str) else ""


def write_report(run: str | Path) -> Path:
    """Writes a run's `report.html` anew from its newest checkpoint, also while it trains; returns its path.

    Raises:
        CheckpointError: There is no such run, or no checkpoint that can be read.
    """
    saved = load_run(run)
    report = Report(saved.config.name, None, saved.history)
    with saved.store():
        saved.task.collect()
        num_rows = saved.task.rows()
        fill_report(report, saved.config, saved.task, saved.facts, step=saved.step, num_rows=num_rows)
    path = saved.run_dir / REPORT
    report.write(path)
    return path


# Several runs.


def compare_runs(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Prints what runs ended with and how their configurations differ, and writes a page with their curves.

    Args:
        runs: Run directories, or names of runs.
        output: The page to write.

    Returns:
        Its path.

    Raises:
        CheckpointError: There is no such run, or no checkpoint that can be read.
    """
    saved = {_label(run): load_run(run) for run in runs}
    report = Report("Comparison of runs", Console())
    metrics = [name for name in _metric_names(saved.values()) if name not in ("rows_per_s", "skipped_steps")]
    rows = []
    for name in metrics:
        points = {label: curve(run.history, name) for label, run in saved.items()}
        rows.append([f"{name}, last", *(_number(each[-1][1]) if each else "" for each in points.values())])
        if name == "elbo" or name.startswith(PREFIX):
            for title, best in (("lowest", min), ("highest", max)):
                values = [[value for _, value in each] for each in points.values()]
                rows.append([f"{name}, {title}", *(_number(best(each)) if each else "" for each in values)])
    report.table("Metrics", ["metric", *saved], [["steps", *(f"{run.step:,}" for run in saved.values())], *rows])

    report.table("Configuration", ["key", *saved], _config_rows([run.config for run in saved.values()]))
    for name in (each for each in metrics if each == "elbo" or each.startswith(PREFIX)):
        report.heading(name)
        report.figure(curves_figure({label: curve(run.history, name) for label, run in saved.items()}, name), name)
    path = Path(output)
    report.write(path)
    return path


def write_sweep(
    name: str, metric: str, trials: Sequence[tuple[Path, Mapping[str, Any], str, float | None]], output: Path
) -> Path:
    """Prints the trials of a sweep, the best first, and writes a page with their curves.

    Args:
        name: Of the sweep.
        metric: What trials are compared by.
        trials: Run directory, changed keys, state and value of each, in the order in which they are shown.
        output: The page to write.

    Returns:
        Its path.
    """
    report = Report(name, Console())
    keys = list(dict.fromkeys(key for _, values, _, _ in trials for key in values))
    rows = [
        [run_dir.name, state, "" if value is None else _number(value), *(str(values.get(key, "")) for key in keys)]
        for run_dir, values, state, value in trials
    ]
    report.table("Trials", ["run", "state", metric, *keys], rows, "The best one comes first.")
    try:
        curves = {run_dir.name: curve(read_metrics(run_dir), metric) for run_dir, *_ in trials}
        report.heading(metric)
        report.figure(curves_figure(dict(list(curves.items())[:MAX_CURVES]), metric), f"{metric} of the best trials.")
        for key in keys:
            points = [(values[key], value) for _, values, state, value in trials if value is not None and key in values]
            numbers = [(x, y) for x, y in points if isinstance(x, int | float) and not isinstance(x, bool)]
            if len({x for x, _ in numbers}) > 1:
                report.figure(points_figure(numbers, key, metric), f"The last {metric} of each trial by {key}.")
    except ImportError:
        report.text("There are no figures without matplotlib: pip install matplotlib.")
    report.write(output)
    return output


def _label(run: str | Path) -> str:
    return Path(run).name


def _metric_names(runs: Any) -> list[str]:
    rows = (row for run in runs for row in run.history)
    return list(dict.fromkeys(name for row in rows for name in row if name != "step"))


def _number(value: float) -> str:
    return f"{value:,.6g}" if math.isfinite(value) else str(value)


def _config_rows(configs: Sequence[RunConfig]) -> list[list[str]]:
    """Returns a row for each key in which some configuration differs from the first."""
    dumped = [config.model_dump(mode="json", exclude={"name", "run_dir"}) for config in configs]
    values: dict[str, list[Any]] = {}
    for index, other in enumerate(dumped[1:], start=1):
        for key, first, now in differences(dumped[0], other):
            values.setdefault(key, [first] * len(dumped))[index] = now
    return [[key, *map(str, row)] for key, row in values.items()]

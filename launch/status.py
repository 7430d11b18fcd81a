"""The state of runs and how far they are: as lines, as JSON, or as a table that follows them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import runs
from .jobs import State
from .progress import Progress, duration, progress_of

if TYPE_CHECKING:
    from rich.table import Table

WATCH_S = 1.0
NARROW = 100
"""Columns of a terminal below which the table leaves the speed out, so that names of runs have room."""
COLUMNS = ("step", "ELBO", "rows/s", "left", "checkpoint")
STYLES = {"done": "green", "failed": "red", "running": "cyan", "pending": "yellow", "stopped": "yellow"}


def state_of(directory: Path) -> State:
    """Returns a run's state; `unknown` with the reason where its platform gives no answer."""
    try:
        return runs.job_of(directory).state()
    except runs.ERRORS as error:
        return State("unknown", str(error))


def line_of(directory: Path) -> str:
    """Returns one line: directory, state, detail and, where the run has logged something, progress; between tabs."""
    state = state_of(directory)
    progress = _progress(directory, state)
    fields = [str(directory), state.phase, state.detail, *([str(progress)] if progress is not None else [])]
    return "\t".join(fields)


def _progress(directory: Path, state: State) -> Progress | None:
    """Returns how far a run is; nobody waits for the end of one that has failed or was stopped."""
    progress = progress_of(directory)
    is_interrupted = state.phase in ("failed", "stopped")
    return replace(progress, left_s=None) if progress is not None and is_interrupted else progress


def as_json(directories: Sequence[Path]) -> str:
    """Returns a list with an object for each run: `run`, `state`, `detail` and `progress`, null without one."""
    entries: list[dict[str, Any]] = []
    for directory in directories:
        state = state_of(directory)
        progress = _progress(directory, state)
        entries.append(
            {
                "run": str(directory),
                "state": state.phase,
                "detail": state.detail,
                "progress": None if progress is None else progress.as_json(),
            }
        )
    return strict_json(entries, indent=2)


def strict_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON; null stands for numbers that JSON has not, as those of a run that has diverged."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def watch(find: Callable[[], Sequence[Path]]) -> None:
    """Shows a table of runs that follows them until all have ended, or Ctrl-C.

    Args:
        find: Returns the runs; it is asked again and again, so that a run that is started meanwhile appears.
    """
    from rich.console import Console
    from rich.live import Live

    try:
        with Live(console=Console(), auto_refresh=False) as live:
            while True:
                states = {directory: state_of(directory) for directory in find()}
                live.update(_table(states, is_narrow=live.console.width < NARROW), refresh=True)
                if all(state.ended or state.phase == "unknown" for state in states.values()):
                    return
                time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return


def _table(states: dict[Path, State], *, is_narrow: bool) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # Names tell runs apart by their ends, as those of a sweep do: in a narrow terminal they are folded, never cut.
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    columns = [name for name in COLUMNS if not (is_narrow and name == "rows/s")]
    for name in columns:
        table.add_column(name, justify="right")
    for directory, state in states.items():
        cells = _cells(_progress(directory, state))
        phase = Text(state.phase, style=STYLES.get(state.phase, ""))
        table.add_row(Text(str(directory)), phase, *(Text(cells.get(name, "")) for name in columns))
    return table


def _cells(progress: Progress | None) -> dict[str, str]:
    """Returns the texts of a row of the table by column."""
    if progress is None:
        return {}
    total = "" if progress.num_steps is None else f" of {progress.num_steps:,}"
    saved = ""
    if progress.checkpoint is not None and progress.checkpoint_s_ago is not None:
        saved = f"{progress.checkpoint:,}, {duration(progress.checkpoint_s_ago)} ago"
    return {
        "step": f"{progress.step:,}{total}",
        "ELBO": "" if progress.elbo is None else f"{progress.elbo:,.0f}",
        "rows/s": "" if progress.rows_per_s is None else f"{progress.rows_per_s:,.0f}",
        "left": duration(progress.left_s) if progress.left_s else "",
        "checkpoint": saved,
    }

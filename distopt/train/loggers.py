"""What is measured on the way: one JSON object a line, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

FILE_NAME = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's metrics.jsonl, oldest first; a last line that was cut off is left out."""
    path = run_dir / FILE_NAME
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Metrics:
    """Writes rows of numbers to `run_dir/metrics.jsonl` and as TensorBoard events to `run_dir/tensorboard`.

    Rows of a run that is gone on with are kept up to the step it goes on from, and written anew from there, so that no
    step appears twice.

    Args:
        run_dir: folder of the run; must exist.
        step: the step the run goes on from; 0 for a new one.
        tensorboard: whether to write TensorBoard events too; without the package they are left out.
    """

    def __init__(self, run_dir: Path, step: int = 0, *, tensorboard: bool = True) -> None:
        path = run_dir / FILE_NAME
        kept = [row for row in read_metrics(run_dir) if row["step"] <= step]
        rewritten = path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(rewritten, path)
        self._file = path.open("a", encoding="utf-8")
        self._events = _summary_writer(run_dir / "tensorboard", step) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """Appends a row. JSON knows no infinity and no NaN; they are written as null."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left and ends the writer's thread."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What an earlier process wrote beyond this step is hidden by TensorBoard.
    return SummaryWriter(str(folder), purge_step=step + 1)


# What the user sees while the run goes on: a bar on a terminal, plain lines in a log.


class StepProgress:
    """Tells step, ELBO, rows per second and time left.

    Args:
        console: where to; a bar is drawn where it is a terminal.
        step: steps done already.
        num_steps: steps of the whole run.
    """

    def __init__(self, console: Console, step: int, num_steps: int) -> None:
        self._console = console
        self._num_steps = num_steps
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[measured]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=step, measured="")

    def __enter__(self) -> StepProgress:
        """Draws the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to `step`; draws at most ten times a second, and nothing in a log."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def measured(self, step: int, elbo: float, rows_per_s: float, steps_per_s: float) -> None:
        """Shows what was measured over the last steps."""
        text = f"ELBO {elbo:,.0f}  {rows_per_s:,.0f} rows/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, measured=text)
        else:
            left = timedelta(seconds=round((self._num_steps - step) / steps_per_s))
            self._console.print(f"step {step:,} of {self._num_steps:,}  {text}  {left} left", highlight=False)


def printer(console: Console | None) -> Callable[[str], None]:
    """Returns what prints a line on rank 0, where there is a console, and nothing elsewhere."""
    if console is None:
        return lambda line: None
    return lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)

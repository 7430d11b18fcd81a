"""What the user sees while the run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


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

"""Where measurements of a run go: `Logger`, the contract, and the loggers that distopt ships.

Only rank 0 has loggers. A run calls, in this order,

    start(run)                  once, before the first step
    after_step(step)            after every step
    log(step, values)           after every `log.every_steps` steps, and after the last one
    finish(outcome)             when the run is done or was stopped, not when it fails
    close()                     once, also when the run fails

so a logger of one's own is one class with the methods that it needs, which the configuration names:
`log.loggers: [mymodule:MyLogger]`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distopt.launchers import METRICS_FILE
from distopt.run_files import parse_row

MAX_PENDING_ROWS = 100_000
"""Rows that are kept while they cannot be written; the oldest are dropped first."""


@dataclass(frozen=True)
class RunInfo:
    """What a logger is given when the run starts.

    Args:
        name: Name of the run.
        run_dir: Folder of the run, which exists.
        first_step: Step that the run resumes from, 0 for a new run. Rows beyond it that an earlier process has logged
            belong to steps that are repeated now: a logger that keeps them would show them twice.
        num_steps: Steps of the whole run.
        config: The configuration as nested dicts, lists, strings and numbers, without the variables of `launch.env`,
            which may be secrets.
    """

    name: str
    run_dir: Path
    first_step: int
    num_steps: int
    config: Mapping[str, Any] = field(default_factory=dict)


class Logger:
    """Receives the measurements of a run, on rank 0; subclass it and override the methods that you need.

    An instance is made with the `args` of its entry in `log.loggers`. What a method raises ends the run on all ranks,
    so a logger that can do without its server catches the server's errors itself.

    Example:
        >>> class BestElbo(Logger):
        ...     def start(self, run):
        ...         self.best = -math.inf
        ...     def log(self, step, values):
        ...         self.best = max(self.best, values["elbo"])
    """

    def start(self, run: RunInfo) -> None:
        """Prepares for the first step; also drops what was logged beyond `run.first_step` (see `RunInfo`)."""

    def after_step(self, step: int) -> None:
        """Notes that `step` steps are done. It runs after every step, so it should take microseconds.

        Args:
            step: Steps done, counted from the start of the run.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs what was measured since the last call.

        Args:
            step: Steps done, counted from the start of the run.
            values: `elbo` (nats, mean over the steps and over all ranks), `rows_per_s` (over all ranks), `train_s`
                (seconds of training, over all processes of the run), `lr` (the largest), `gradient_norm` (2-norm of the
                last step's averaged gradient; NaN if it is not known), `skipped_steps` (of this process, for a gradient
                that was not finite), `validation/...` and those of the task's `metrics`. Of a script: what it has
                passed to `Session.log`, `train_s`, `lr`, and `rows_per_s` or `steps_per_s`. Values may be NaN or
                infinite.
        """

    def finish(self, outcome: Literal["done", "stopped"]) -> None:
        """Notes how the run ended; a run that fails is closed without it.

        Args:
            outcome: `done` after the last step or an early stop, `stopped` after a signal: it can be resumed.
        """

    def close(self) -> None:
        """Writes what is left and frees what `start` took; called once, also when the run fails."""


class Loggers(Logger):
    """Passes every call on to several loggers, as a context that starts and closes them.

    Args:
        loggers: In the order in which they are called; they are closed in reverse order, each of them even if another
            one fails.
        run: Given to all of them.
    """

    def __init__(self, loggers: Sequence[Logger], run: RunInfo) -> None:
        self._loggers = loggers
        self._run = run
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Starts all loggers; if one fails, those that were started before it are closed."""
        # `pop_all` hands the callbacks over when all have started; until then an error closes those that have.
        with ExitStack() as started:
            for logger in self._loggers:
                logger.start(self._run)
                started.callback(logger.close)
            self._open = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes all loggers."""
        self._open.close()

    def after_step(self, step: int) -> None:
        """Passes the call on."""
        for logger in self._loggers:
            logger.after_step(step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the call on."""
        for logger in self._loggers:
            logger.log(step, values)

    def finish(self, outcome: Literal["done", "stopped"]) -> None:
        """Passes the call on."""
        for logger in self._loggers:
            logger.finish(outcome)


# Metrics are best effort: a run whose run directory is full, or belongs to another user, trains all the same, since its
# checkpoints may lie elsewhere. What could not be written is told once, with its path.


class JsonLinesLogger(Logger):
    """Writes one JSON object per line to `metrics.jsonl` in the run directory, which the report reads.

    Rows that cannot be written, as while the disk is full, are kept and written when they can be.
    """

    def start(self, run: RunInfo) -> None:
        """Opens the file, with the rows up to the step that the run resumes from."""
        self._path = run.run_dir / METRICS_FILE
        self._file: BinaryIO | None = None
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING_ROWS)
        self._has_failed = False
        try:
            self._file = self._path.open("ab", buffering=0)
            # Cut in place, which needs no space and is done or not done when the process is killed here.
            self._file.truncate(_size_until(self._path, run.first_step))
        except OSError as error:
            self._report(error)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row. JSON has neither infinity nor NaN; they are written as null."""
        row = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._pending.append(f"{json.dumps(row)}\n".encode())
        self._write()

    def close(self) -> None:
        """Closes the file."""
        self._write()
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        if self._file is None:
            return
        while self._pending:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(self._pending[0]) != len(self._pending[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                self._report(error)
                self._file.truncate(size)  # half a row
                return
            self._pending.popleft()
        self._has_failed = False

    def _report(self, error: OSError) -> None:
        if not self._has_failed:
            report_unwritable(self._path, error)
        self._has_failed = True


def _size_until(path: Path, step: int) -> int:
    """Returns how many bytes of a file of metrics hold the rows up to a step, before a line that was cut off."""
    size = 0
    for line in path.read_bytes().splitlines(keepends=True):
        row = parse_row(line)
        if not line.endswith(b"\n") or (row is not None and row["step"] > step):
            break
        size += len(line)
    return size


def report_unwritable(path: Path, error: OSError) -> None:
    """Prints that a file of the run directory cannot be written, which ends no training."""
    print(f"distopt: {path} cannot be written: {error.strerror}; training continues", file=sys.stderr, flush=True)


class TensorBoardLogger(Logger):
    """Writes TensorBoard events to `tensorboard/` in the run directory, or nothing without the package."""

    def __init__(self) -> None:
        self._events: Any = None

    def start(self, run: RunInfo) -> None:
        """Opens a file of events."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._path = run.run_dir / "tensorboard"
        with self._without_errors():
            # TensorBoard hides what an earlier process wrote from `purge_step` on.
            self._events = SummaryWriter(str(self._path), purge_step=run.first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar per value."""
        with self._without_errors():
            for name, value in values.items():
                if self._events is not None:
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the writer's thread."""
        with self._without_errors():
            if self._events is not None:
                self._events.close()

    @contextmanager
    def _without_errors(self) -> Iterator[None]:
        """Reports an error of the file, and writes no more events; a thread of TensorBoard's has met it and ended."""
        try:
            yield
        except OSError as error:
            self._events = None
            report_unwritable(self._path, error)


class ProgressLogger(Logger):
    """Shows step, ELBO, rows per second and remaining time: as a bar on a terminal, as plain lines in a file.

    Args:
        console: Where to show it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def start(self, run: RunInfo) -> None:
        """Draws the bar."""
        self._num_steps = run.num_steps
        self._last_step = run.first_step
        self._last_time_s = monotonic()
        if not self._console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[measured]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
        )
        self._task = self._bar.add_task("", total=run.num_steps, completed=run.first_step, measured="")
        self._bar.start()

    def after_step(self, step: int) -> None:
        """Moves the bar, which is drawn ten times a second at most."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows what was measured."""
        now_s = monotonic()
        s_per_step = (now_s - self._last_time_s) / max(step - self._last_step, 1)
        self._last_step = step
        self._last_time_s = now_s

        text = _shown(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, measured=text)
        else:
            left = timedelta(seconds=round((self._num_steps - step) * s_per_step))
            # To wrap a line, rich keeps the widths of the last 4,096 words that it has seen, twice.
            printer(self._console)(f"step {step:,} of {self._num_steps:,}  {text}  {left} left")

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def _shown(values: Mapping[str, float]) -> str:
    """Returns what a line of progress shows; a script may log neither an ELBO nor rows."""
    texts = [f"ELBO {values['elbo']:,.0f}"] if "elbo" in values else []
    texts += [f"{values['rows_per_s']:,.0f} rows/s"] if "rows_per_s" in values else []
    texts += [f"{values['steps_per_s']:,.3g} steps/s"] if "steps_per_s" in values else []
    return "  ".join(texts)


def printer(console: Console | None) -> Callable[[str], None]:
    """Returns a function that prints a line on `console`, or does nothing without one (on all ranks but rank 0)."""
    if console is None:
        return lambda line: None
    return lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)

"""`Session`: what a run has around its steps, for `distopt train` and for the loop of a script.

Stop signals that all ranks obey after the same step, the checkpoint to resume from and those to save, metrics,
progress, stragglers, the state that is served, and the report.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from rich.console import Console

from distopt.backends import Backend, current
from distopt.checkpoint import Checkpointer, Restored, Retention
from distopt.config import MAY_CHANGE, ConfigError, RunConfig, load_config, parse_config
from distopt.config.schema import is_run_name
from distopt.launchers import CONFIG_FILE, CONFIG_VARIABLE, RUN_DIR_VARIABLE, find_rank
from distopt.optim import DistributedOptimizer, PyroOptim
from distopt.rng import seed_all
from distopt.train.components import make_loggers, refused
from distopt.train.facts import Facts
from distopt.train.loggers import Logger, Loggers, RunInfo, printer
from distopt.train.loop_end import LoopEnd
from distopt.train.measurements import Measurements
from distopt.train.monitor import PaceMeter, RankPace, Status, describe_straggler
from distopt.train.recorded_config import recorded_config, without_secrets
from distopt.train.resume import describe_restored, which_checkpoint
from distopt.train.run_page import report_of_loop
from distopt.train.serve import serving
from distopt.train.signals import StopSignals
from distopt.train.task import Task
from distopt.train.validation import PREFIX, Measured, Validation


class Session:
    """Runs the loop of a script as `distopt train` runs that of a task.

    As a context it resumes from the newest checkpoint of the run, and saves a last one when it is stopped. What it
    does and how often is in the run's YAML (`run_dir`, `train.num_steps`, `checkpoint`, `log`, `serve`), as for a task.

    Args:
        saved: What a checkpoint holds besides the parameter store, by name: optimizers, modules, and anything that has
            `state_dict` and `load_state_dict`. As for `Checkpointer`.
        num_steps: Steps of the whole run; None takes `train.num_steps`.
        config: The run; None takes that of the YAML with which the script was launched, and for a script that was
            started without one the defaults with `runs/<name of the script>` as run directory.
        rows_per_step: Rows of the data in a step, over all ranks, to log the speed in rows.
        validate: Returns this rank's part of each metric on data that the loop does not train on, as `Task.validate`
            does. It is called on all ranks after every `train.validate_every_steps` steps, without gradients;
            `train.early_stopping` and `checkpoint.keep_best` decide by it, as for a task.

    Attributes:
        first_step: Steps that were done before this process.
        config: The run.

    Raises:
        CheckpointError: There are checkpoints, and none can be restored.
        ConfigError: The YAML asks for validation, and there is no `validate`.

    Cost:
        With several ranks one all-reduce of two numbers after each step, by which they agree to stop.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pyro
        >>> from distopt.optim import Adam
        >>> pyro.clear_param_store()
        >>> with TemporaryDirectory() as folder:
        ...     config = RunConfig(name="demo", run_dir=folder, script="demo.py", log={"tensorboard": False})
        ...     with Session({"optimizer": Adam({"lr": 0.1})}, num_steps=3, config=config) as session:
        ...         for step in session.steps():
        ...             session.log(elbo=-1.0 / (step + 1))  # doctest: +ELLIPSIS
        step 3 of 3  ELBO -1 ...
        report: ...
    """

    ends_process = True
    """Whether a run that was stopped ends the process, so that what follows the loop does not take it for done."""

    def __init__(
        self,
        saved: Mapping[str, Any],
        *,
        num_steps: int | None = None,
        config: RunConfig | None = None,
        rows_per_step: int | None = None,
        validate: Callable[[], Mapping[str, Measured]] | None = None,
    ) -> None:
        config = config or config_of_script()
        if num_steps is not None:
            train = config.train.model_copy(update={"num_steps": num_steps})
            config = config.model_copy(update={"train": train})
        self.config = config
        self.backend: Backend = current()
        self.status = Status()
        self.stop = StopSignals()
        self.validation = _validation(config, validate, self.backend)
        self.first_step = 0
        self._saved = saved
        self._rows_per_step = rows_per_step
        self._more: Callable[[], dict[str, float]] = lambda: _learning_rate(saved)
        self.console = Console() if self.backend.rank == 0 else None
        self.print = printer(self.console)
        self._pace = PaceMeter(self.backend)
        self._paces: list[RankPace] = []
        self._last_step = 0
        self.progress: dict[str, Any] = {}  # what checkpoints hold besides, as JSON
        self._end = LoopEnd(self.backend, saved.values())

    def __enter__(self) -> Self:
        """Resumes, and starts the loggers."""
        config = self.config
        with refused("run_dir", (OSError,)):
            config.run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            if self.ends_process:
                rank_info = find_rank()
                opened.enter_context(self.stop)
                opened.enter_context(serving(config.serve, self.status, (rank_info and rank_info.local_rank) or 0))
                self.stop.hold()
            self._checkpointer = opened.enter_context(self._make_checkpointer())
            self.first_step = self._last_step = self._resume()
            self._facts = Facts(config, self.backend, self.first_step)
            run_dir = config.run_dir if self.console else None
            self._measurements = Measurements(run_dir, self.first_step, self._rows_per_step)
            self._loggers = opened.enter_context(self._make_loggers())
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the run: waits for the last checkpoint, and writes the report of one that is done.

        A loop that was left by `break` is done: a checkpoint of its last step is saved.

        Raises:
            DisagreementError: This rank has left its loop before a step that another rank takes.
            SystemExit: The run was stopped by a signal; with 128 and its number, once the checkpoint is saved.
        """
        if error is not None:
            if self.ends_process and isinstance(error, Exception):
                self.backend.fail(error)  # the other ranks wait for this one, and now raise this cause instead
            self._opened.__exit__(kind, error, traceback)
            return

        with self._opened:
            if self._end.is_in_step:
                self._leave()
            outcome: Literal["done", "stopped"] = "done" if self.is_done else "stopped"
            self._loggers.finish(outcome)
            self._checkpointer.wait()
        self._facts.note(
            outcome=outcome, step=self._last_step, early_stop=self.early_stop, best_step=self.validation.best_step
        )
        self.status.progress()

        if self.early_stop is not None:
            self.print(f"stopped early after step {self._last_step:,}: {self.early_stop}")
        if self._end.is_stopped and not self.is_done:
            self.print(f"stopped after step {self._last_step:,}; run the same command again to resume")
            if self.ends_process:
                sys.exit(self.exit_status)
        elif self.is_done and self.ends_process:
            self.write_report()

    @property
    def exit_status(self) -> int:
        """0 when all steps are done, else 128 and the number of the signal that stopped the run."""
        return 0 if self.is_done else 128 + (self.stop.received or signal.SIGTERM)

    @property
    def is_done(self) -> bool:
        """Whether the run has nothing left to do: its last step is done, it has stopped early, or its loop was left."""
        return self.early_stop is not None or self._last_step >= self.config.train.num_steps

    @property
    def early_stop(self) -> str | None:
        """Why the run has nothing left to do before its last step; None while it has."""
        if self._end.is_left and not self._end.is_stopped:
            return "the script left its loop"
        return self.validation.early_stop

    # Before the first step.

    def _make_checkpointer(self) -> Checkpointer:
        config = self.config
        return Checkpointer(
            config.checkpoints(),
            self._saved,
            keep=Retention(config.checkpoint.keep_last, config.checkpoint.keep_every_steps),
            config=recorded_config(config),
            ignore_keys=MAY_CHANGE,
            backend=self.backend,
        )

    def _resume(self) -> int:
        """Restores a checkpoint if there is one to resume from; returns the steps that are done already."""
        config = self.config
        which, is_new = which_checkpoint(config, has_checkpoints=bool(self._checkpointer.steps()))
        schedule = config.optim.scheduler
        restored: Restored | None = self._checkpointer.restore(
            which,
            only=config.checkpoint.resume_only,
            new_run=is_new,
            schedule_every=schedule.every_steps if schedule else 1,
        )

        first_step = 0
        if restored is not None:
            first_step = 0 if is_new else restored.step
            self.progress = dict(restored.progress) if not is_new and isinstance(restored.progress, Mapping) else {}
            self.validation.load_state(self.progress)
            for line in describe_restored(restored, config, self.backend.world_size, is_new=is_new):
                self.print(line)
            self.status.checkpoint_at = time.monotonic()

        self.status.step = first_step
        self.status.resumed_from = first_step
        self.status.joined = True
        self.status.progress()
        return first_step

    def _make_loggers(self) -> Loggers:
        """Makes the loggers of rank 0; on other ranks there is only the status, which every rank serves."""
        config = self.config
        loggers: list[Logger] = [self.status]
        if self.console is not None:
            loggers += make_loggers(config, self.console)
        shown = without_secrets(config)
        return Loggers(loggers, RunInfo(config.name, config.run_dir, self.first_step, config.train.num_steps, shown))

    # The steps.

    def steps(self) -> Iterator[int]:
        """Yields the numbers of the steps that are left, counted from 0; the body of the loop takes the step.

        Before the body, the random generators are seeded by `seed`, step, rank and `train.noise` of the YAML, so that a
        run that resumes draws what an undisturbed one does. After it, all ranks agree whether one of them was asked to
        stop; then the loop ends, after a last checkpoint.

        A body that leaves the loop by `break` ends the run as its last step does. If it does so after its step, one
        rank is enough: the others leave theirs after the same step. Before it, all ranks must. Another loop over
        `steps()` in the same session goes on from there.
        """
        num_steps = self.config.train.num_steps
        if self._end.go_on():  # an earlier loop was left after its step, as that of a warm-up
            self._last_step += 1
            self._after_step(self._last_step)
        while not self.is_done and not self._end.is_stopped:
            # Random streams are seeded by step, so a resumed run draws what an undisturbed one would.
            seed_all(self.config.seed, self._last_step, self.backend.rank, self.config.train.noise)
            with self._end.step(), self._pace.step():
                yield self._last_step
            self._last_step += 1
            self._after_step(self._last_step)

        if self.first_step >= num_steps:
            self.print(f"all {num_steps:,} steps were done before")

    def log(self, **values: float) -> None:
        """Notes measurements of this step; what is logged every `log.every_steps` steps is their mean, on rank 0.

        Args:
            **values: By name, such as `elbo` in nats; all ranks may call it.
        """
        self._measurements.add(values)

    def is_logged(self, step: int) -> bool:
        """Returns whether a row is logged after step number `step`, counted from 1."""
        is_last = self._end.is_left or step == self.config.train.num_steps
        return is_last or self.validation.is_due(step) or step % self.config.log.every_steps == 0

    def note_stop(self, stop: bool) -> None:
        """Says that all ranks have agreed already in this step whether to stop, as they do with the gradients."""
        self._end.note_stop(stop)

    def _after_step(self, step: int) -> None:
        """Logs, validates and saves what is due after step number `step`."""
        self._end.agree(self.stop.received != 0)
        self._measurements.count_step()
        self._loggers.after_step(step)

        is_validated = self.validation.is_due(step)
        is_best = is_validated and self.validation.run(step)
        if self.is_logged(step):
            self.status.all_reduce_s = self.backend.all_reduce_s
            self.status.all_reduce_bytes = self.backend.all_reduce_bytes
            values = self._measurements.close() | self._more()
            if is_validated:
                values |= {f"{PREFIX}{name}": value for name, value in self.validation.values.items()}
            self._loggers.log(step, values)
        self.status.checkpoint_at = self._checkpointer.committed_at or self.status.checkpoint_at
        if self._end.is_stopped or self.is_done or is_best or self._is_save_due(step):
            self._save(step)

    def _leave(self) -> None:
        """Ends the loop after its body has left it."""
        if self._end.leave():
            self._last_step += 1
            self._after_step(self._last_step)
        elif self._last_step > self.first_step:
            self._save(self._last_step)

    def _is_save_due(self, step: int) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return every_steps is not None and step % every_steps == 0

    def _save(self, step: int) -> None:
        """Saves a checkpoint, and reports a rank that has become a straggler since the last one."""
        began_s = time.monotonic()
        progress = self.progress | self.validation.state() or None
        self._checkpointer.save(step, progress=progress, best=self.validation.best_step)
        self.status.checkpoint_s = time.monotonic() - began_s

        previous = describe_straggler(self._paces)
        self._paces = self._pace.all_ranks()
        self._facts.note_paces(self._paces)
        straggler = describe_straggler(self._paces)
        if straggler and not previous:
            self.print(f"step {step:,}: {straggler}")

    # After the last step.

    def write_report(self, task: Task | None = None, num_rows: int | None = None) -> None:
        """Writes `report.html`, on rank 0.

        Args:
            task: Adds its results; None shows the parameters.
            num_rows: Rows of the training set, by which the ELBO is divided.
        """
        if self.backend.rank == 0:
            page = report_of_loop(self.config, self.console, task, step=self._last_step, num_rows=num_rows)
            self.print(page)


def _validation(
    config: RunConfig, validate: Callable[[], Mapping[str, Measured]] | None, backend: Backend
) -> Validation:
    """Returns what validates the run.

    Raises:
        ConfigError: The YAML asks for validation of one that does not.
    """
    every_steps = config.train.validate_every_steps
    if validate is None and every_steps is not None:
        raise ConfigError(
            [f"train.validate_every_steps: found {every_steps}, but the Session of {config.script} has no function to "
             "call; pass one, as in Session(..., validate=validate), or set it to null"]
        )  # fmt: skip
    return Validation(config, validate or dict, backend)


def _learning_rate(saved: Mapping[str, Any]) -> dict[str, float]:
    """Returns the largest learning rate of the optimizers among what is saved, for the loggers."""
    optimizers = [each.optim if isinstance(each, DistributedOptimizer) else each for each in saved.values()]
    rates = [rate for each in optimizers if isinstance(each, PyroOptim) for rate in each.learning_rates()]
    return {"lr": max(rates)} if rates else {}


def config_of_script() -> RunConfig:
    """Returns the YAML with which this script was launched, or defaults for one that was started without.

    Raises:
        ConfigError: The YAML in the run directory cannot be read.
    """
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if run_dir is not None and CONFIG_VARIABLE in os.environ:  # in a pod
        return parse_config(os.environ[CONFIG_VARIABLE], source=CONFIG_VARIABLE)
    if run_dir is not None:
        return load_config(Path(run_dir) / CONFIG_FILE)
    script = sys.argv[0] or "script"  # empty in an interactive interpreter
    name = Path(script).stem.strip("_")
    return RunConfig.model_validate({"name": name if is_run_name(name) else "script", "script": script})

"""The training loop: what each worker of a run does, from joining the others to the last checkpoint."""

from __future__ import annotations

import signal
import sys
import time
from datetime import timedelta

import pyro
import torch
from rich.console import Console
from torch import nn

from distopt.backends import Backend, BackendError, init
from distopt.checkpoint import Checkpointer, CheckpointError, Restored, Retention
from distopt.checkpoint.module_state import RegisteredModules
from distopt.config import MAY_CHANGE, ConfigError, RunConfig
from distopt.data import GlobalBatches, Loader
from distopt.infer import SVI, seed_all
from distopt.launchers import LauncherError, find_rank
from distopt.optim import DistributedOptimizer, StepInfo
from distopt.reduce import DisagreementError, DriftError, PeerError
from distopt.run_files import read_facts, read_metrics
from distopt.train.components import make_loggers, make_loss, make_optimizer, refused
from distopt.train.facts import Facts
from distopt.train.loggers import Logger, Loggers, RunInfo, printer
from distopt.train.measurements import Measurements
from distopt.train.monitor import PaceMeter, RankPace, Status, describe_straggler
from distopt.train.plate_check import check_plates
from distopt.train.recorded_config import recorded_config
from distopt.train.report import Report
from distopt.train.resume import describe_restored, which_checkpoint
from distopt.train.run_page import REPORT, fill_report
from distopt.train.serve import ServeError, serving
from distopt.train.setup import count_rows, load_task_on_all_ranks, set_up_process
from distopt.train.signals import StopSignals
from distopt.train.task import TaskError, TaskRows
from distopt.train.validation import PREFIX, Validation
from distopt.worker_error import is_permanent, record_error

# Rows that the parameters are made from. A guide's first call needs some rows, and all of them might not fit in memory.
_INIT_ROWS = 1024

# One step in so many has Pyro's checks on all along: a value that leaves its support late is found.
_CHECKED_STEPS = 100

# Errors that a user fixes after reading one line; any other error is a defect, and its traceback shows where.
_SHARED_ERRORS = (BackendError, PeerError, DisagreementError, DriftError)  # raised on all ranks already
_PLAIN_ERRORS = (*_SHARED_ERRORS, ConfigError, LauncherError, TaskError, CheckpointError, ServeError)


def run(config: RunConfig, *, until_exit: bool = False) -> int:
    """Trains the task of `config` as one of its workers; every rank calls it.

    The run resumes from the newest good checkpoint in `run_dir/checkpoints` unless the configuration says otherwise.
    After SIGTERM or Ctrl-C, all ranks finish the same step, save a checkpoint and stop. Before the ranks have met,
    a signal ends the process at once.

    Args:
        config: The run.
        until_exit: Whether the process ends after the call, so that signals to stop have nothing left to ask for.

    Returns:
        0 when all steps are done, 143 after SIGTERM, 130 after Ctrl-C, 1 after an error, which has been printed.

    Cost:
        One all-reduce per step.
    """
    backend: Backend | None = None
    status = Status()
    stop = StopSignals(until_exit=until_exit)
    try:
        rank_info = find_rank()
        local_rank = (rank_info and rank_info.local_rank) or 0
        # The server starts before the ranks have met: whether they ever will is when one wants to ask.
        with stop, serving(config.serve, status, local_rank):
            backend = init(config.reduce.backend, timeout=timedelta(seconds=config.reduce.timeout_s))
            stop.hold()
            return _Worker(config, backend, status, stop).run()
    except Exception as error:
        from_peer = isinstance(error, BackendError | PeerError)
        in_first_step = backend is not None and status.steps_done == 0
        permanent = not from_peer and is_permanent(error, in_first_step=in_first_step)
        record_error(error, from_peer=from_peer, permanent=permanent, resumed_from=status.resumed_from)
        if backend is not None and not isinstance(error, _SHARED_ERRORS):
            backend.fail(error)  # the other ranks wait for this one, and now raise this cause instead
        if not isinstance(error, _PLAIN_ERRORS):
            raise
        who = f"rank {backend.rank} of {backend.world_size}: " if backend is not None else ""
        if stop.received and not status.steps_done and isinstance(error, _SHARED_ERRORS):
            # All ranks are asked, one after the other; one that was asked before it listened has ended at once.
            print(f"distopt: {who}stopped before the first step ({error})", file=sys.stderr, flush=True)
            return 128 + stop.received
        print(f"distopt: {who}{error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if backend is not None:
            backend.close()


class _Worker:
    """One rank of a run.

    `run` tells the story. Every method is called on all ranks unless it says otherwise, since nearly all of them
    communicate.
    """

    def __init__(self, config: RunConfig, backend: Backend, status: Status, stop: StopSignals) -> None:
        self.config = config
        self.backend = backend
        self.status = status
        self.stop = stop
        self.console = Console() if backend.rank == 0 else None
        self.print = printer(self.console)

        set_up_process(config, backend)
        self.task = load_task_on_all_ranks(config, backend)
        self.batches = self._make_batches()

        optimizer, self.step_schedule = make_optimizer(config)
        with refused("reduce"):
            self.optimizer = DistributedOptimizer(
                optimizer,
                backend=backend,
                reduce=config.reduce,
                noise=config.train.noise,
            )
        loss = make_loss(config)
        self.svi = SVI(
            self.task.model,
            self.task.guide,
            self.optimizer,
            loss,
            weight=self.batches.weight,
            capture=config.train.capture,
        )
        self.first_step = 0  # steps that were done before this process started
        self.refusal: str | None = None  # why steps are not captured, once it has been printed
        callables = {"model": self.task.model, "guide": self.task.guide}
        self.modules = {name: each for name, each in callables.items() if isinstance(each, nn.Module)}

        self.skipped = _SkippedSteps(config.optim.max_skipped_in_row)
        self.validation = Validation(config, self.task, backend)
        self.pace = PaceMeter(backend)
        self.paces: list[RankPace] = []

    def run(self) -> int:
        """Trains to the end or to a signal; returns the exit status."""
        self._announce()
        self._make_parameters()
        with refused("run_dir", (OSError,)):
            self.config.run_dir.mkdir(parents=True, exist_ok=True)

        with self._make_checkpointer() as checkpointer:
            first_step = self._resume(checkpointer)
            self.facts = Facts(self.config, self.backend, first_step)
            last_step = self._train(first_step, checkpointer)
            checkpointer.wait()

        is_done = last_step >= self.config.train.num_steps or self.validation.early_stop is not None
        self.facts.note(outcome="done" if is_done else "stopped", step=last_step)
        if not is_done:
            self.print(f"stopped after step {last_step:,}; run the same command again to resume")
            return 128 + (self.stop.received or signal.SIGTERM)
        self.task.collect()
        if self.backend.rank == 0:
            self._write_report()
        self.backend.barrier()
        return 0

    # Before the first step.

    def _make_batches(self) -> GlobalBatches:
        """Decides which rows this rank reads in which step."""
        num_rows = count_rows(self.task, self.backend)
        with refused("data"):
            batches = GlobalBatches(
                num_rows, self.config.data.global_batch, self.config.seed, self.backend.rank, self.backend.world_size
            )
        if self.task.sharded and not batches.full:
            raise TaskError(
                f"data.global_batch is {batches.global_batch:,}, but {self.config.task} is sharded, so that every rank "
                "takes all of its rows in each step: set it to null"
            )
        return batches

    def _announce(self) -> None:
        world, config = self.backend, self.config
        workers = f"{world.world_size} workers over {world.name}" if world.world_size > 1 else "one worker"
        self.print(
            f"{config.name}: {config.task} on {workers}, {self.batches.num_rows:,} rows, "
            f"{self.batches.global_batch:,} per step, {config.train.num_steps:,} steps of {config.optim.name}"
        )

    def _make_parameters(self) -> None:
        """Makes the parameters from the same rows and samples on all ranks; a sharded task's from the rank's own rows.

        A step that takes all rows would need too many here, so at most `_INIT_ROWS` of a step's rows are used.
        """
        seed_all(self.config.seed)
        if self.task.sharded:
            rows = self.batches.rows(0)
        else:
            num_rows = min(_INIT_ROWS, self.batches.global_batch)
            rows = GlobalBatches(self.batches.num_rows, num_rows, self.config.seed).rows(0)

        try:
            self.svi.init(*TaskRows(self.task).read(rows))
            takes_all_rows = self.batches.full and self.backend.world_size == 1
            if not self.task.sharded and not takes_all_rows:
                check_plates(self.task, rows, self.batches.num_rows)
        except Exception as error:
            self.optimizer.abort(error)
            raise
        # What methods of the task register by `pyro.module` is computed with as well.
        self.modules |= RegisteredModules(self.modules).find()
        self.optimizer.synchronize(modules=self.modules.values())

    def _make_checkpointer(self) -> Checkpointer:
        config = self.config
        return Checkpointer(
            config.checkpoints(),
            {"optimizer": self.optimizer, **self.modules},
            keep=Retention(config.checkpoint.keep_last, config.checkpoint.keep_every_steps),
            config=recorded_config(config),
            ignore_keys=MAY_CHANGE,
            backend=self.backend,
        )

    def _resume(self, checkpointer: Checkpointer) -> int:
        """Restores a checkpoint if there is one to resume from; returns the steps that are done already."""
        config = self.config
        which, is_new = which_checkpoint(config, has_checkpoints=bool(checkpointer.steps()))
        schedule = config.optim.scheduler
        restored: Restored | None = checkpointer.restore(
            which,
            only=config.checkpoint.resume_only,
            new_run=is_new,
            schedule_every=schedule.every_steps if schedule else 1,
        )

        first_step = 0
        if restored is not None:
            first_step = 0 if is_new else restored.step
            if not is_new:
                self.validation.load_state(restored.progress)
            for line in describe_restored(restored, config, self.backend.world_size, is_new=is_new):
                self.print(line)
            self.status.checkpoint_at = time.monotonic()

        self.status.step = first_step
        self.status.resumed_from = first_step
        self.status.joined = True
        self.status.progress()
        return first_step

    def _make_loggers(self, first_step: int) -> Loggers:
        """Makes the loggers of rank 0; on other ranks there is only the status, which every rank serves."""
        config = self.config
        loggers: list[Logger] = [self.status]
        if self.console is not None:
            loggers += make_loggers(config, self.console)
        dumped = config.as_json()
        return Loggers(loggers, RunInfo(config.name, config.run_dir, first_step, config.train.num_steps, dumped))

    # The steps.

    def _train(self, first_step: int, checkpointer: Checkpointer) -> int:
        """Takes the steps after `first_step`; returns how many the run has done when it ends or is stopped."""
        self.first_step = first_step
        num_steps = self.config.train.num_steps
        step = first_step
        measurements = Measurements(self.config.run_dir if self.console else None, step, self.batches.global_batch)
        with (
            self._make_loggers(first_step) as loggers,
            Loader(TaskRows(self.task), self.batches, num_ahead=self.config.data.prefetch) as loader,
        ):
            while step < num_steps and self.validation.early_stop is None:
                step += 1
                is_validated = self.validation.is_due(step)
                is_logged = is_validated or step == num_steps or step % self.config.log.every_steps == 0
                info = self._step(step, loader, measure_norm=is_logged)
                measurements.add(info)
                self._report_refusal(step)
                loggers.after_step(step)

                is_best = is_validated and self.validation.run(step)
                if is_logged:
                    loggers.log(step, self._measure(info, measurements, is_validated=is_validated))
                self.status.checkpoint_at = checkpointer.committed_at or self.status.checkpoint_at
                is_last = step == num_steps or self.validation.early_stop is not None
                if info.stop or is_last or is_best or self._is_save_due(step):
                    self._save(checkpointer, step)
                if info.stop:
                    break

        if self.validation.early_stop is not None:
            self.print(f"stopped early after step {step:,}: {self.validation.early_stop}")
        elif first_step >= num_steps:
            self.print(f"all {num_steps:,} steps were done before")
        self.status.progress()
        return step

    def _step(self, step: int, loader: Loader, *, measure_norm: bool) -> StepInfo:
        """Takes step number `step`, counted from 1; returns what the ranks learned from each other in it."""
        config = self.config
        index = step - 1  # data, random streams and the optimizer count from 0
        # Random streams are seeded by step, so a resumed run draws what an undisturbed one would.
        seed_all(config.seed, index, self.backend.rank, config.train.noise)

        scheduler = config.optim.scheduler
        with self.pace.step():
            batch = loader.batch(index)
            stop = self.stop.received != 0
            with pyro.validation_enabled(self._is_checked(step)):
                info = self.svi.step_with(batch, step=index, stop=stop, measure_norm=measure_norm)
            if scheduler is not None and step % scheduler.every_steps == 0:
                self.step_schedule(self.optimizer, info.loss)
        self.status.skipped_steps = self.skipped.count(step, self.optimizer)
        return info

    def _is_checked(self, step: int) -> bool:
        """Returns whether Pyro checks arguments, supports and shapes in this step; that changes no number."""
        num_first = self.config.train.check_steps
        return num_first is None or step <= self.first_step + num_first or step % _CHECKED_STEPS == 0

    def _report_refusal(self, step: int) -> None:
        """Says once, on rank 0, that steps are not captured and why."""
        captured = self.svi.captured
        if captured is not None and captured.refusal is not None and self.refusal is None:
            self.refusal = captured.refusal
            self.print(f"step {step:,}: steps are not captured and run as with train.capture=off: {self.refusal}")

    def _measure(self, info: StepInfo, measurements: Measurements, *, is_validated: bool) -> dict[str, float]:
        """Returns the values for the loggers; those of the task on rank 0 alone, where the loggers are."""
        self.status.all_reduce_s = self.backend.all_reduce_s
        self.status.all_reduce_bytes = self.backend.all_reduce_bytes
        values = measurements.close(info, self.optimizer.optim, self.status.skipped_steps)
        if is_validated:
            values |= {f"{PREFIX}{name}": value for name, value in self.validation.values.items()}
        if self.console is None:
            return values

        with torch.no_grad():
            more = {name: float(value) for name, value in self.task.metrics().items()}
        if values.keys() & more.keys():
            raise TaskError(f"task: metrics() returned {', '.join(values.keys() & more.keys())}, which distopt logs")
        return values | more

    def _is_save_due(self, step: int) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return every_steps is not None and step % every_steps == 0

    def _save(self, checkpointer: Checkpointer, step: int) -> None:
        """Saves a checkpoint, and reports a rank that has become a straggler since the last one."""
        began_s = time.monotonic()
        checkpointer.save(step, progress=self.validation.state() or None, best=self.validation.best_step)
        self.status.checkpoint_s = time.monotonic() - began_s

        previous = describe_straggler(self.paces)
        self.paces = self.pace.all_ranks()
        self.facts.note_paces(self.paces)
        straggler = describe_straggler(self.paces)
        if straggler and not previous:
            self.print(f"step {step:,}: {straggler}")

    # After the last step.

    def _write_report(self) -> None:
        """Writes the report, on rank 0."""
        config = self.config
        report = Report(config.name, self.console, read_metrics(config.run_dir))
        facts, step = read_facts(config.run_dir), self.status.step
        fill_report(report, config, self.task, facts, step=step, num_rows=self.batches.num_rows)

        path = config.run_dir / REPORT
        try:
            report.write(path)
        except OSError as error:
            self.print(f"no report: {path} cannot be written: {error.strerror}")
        else:
            self.print(f"report: {path}")


class _SkippedSteps:
    """The steps that were skipped in a row, on all ranks at once.

    Args:
        limit: After how many of them the run ends.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_row = 0
        self._num_skipped = 0

    def count(self, step: int, optimizer: DistributedOptimizer) -> int:
        """Returns how many steps were skipped so far, after step number `step`.

        Raises:
            TaskError: All of the last ones were; the same on all ranks.
        """
        self._in_row = self._in_row + 1 if optimizer.num_skipped_steps > self._num_skipped else 0
        self._num_skipped = optimizer.num_skipped_steps
        if self._in_row >= self._limit:
            raise TaskError(
                f"step {step:,}: the last {self._in_row:,} steps were skipped, since gradients were not finite "
                f"({', '.join(optimizer.nonfinite_names[:5])}); the log names the ranks. The parameters are still "
                "finite. Lower optim.args.lr, set optim.clip, or change the model; optim.max_skipped_in_row sets how "
                "many are skipped."
            )
        return self._num_skipped

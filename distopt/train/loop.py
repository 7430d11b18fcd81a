"""The training loop: what each worker of a run does, from joining the others to the last checkpoint."""

from __future__ import annotations

import math
import signal
import sys
import time
from datetime import timedelta

import torch
from rich.console import Console
from torch import nn

from distopt.backends import Backend, BackendError, init
from distopt.checkpoint import Checkpointer, CheckpointError, Restored, Retention
from distopt.checkpoint.module_state import RegisteredModules
from distopt.config import MAY_CHANGE, ConfigError, RunConfig, dump_yaml
from distopt.data import GlobalBatches, Loader
from distopt.infer import SVI, seed_all
from distopt.launchers import CHECKPOINTS, LauncherError, find_rank
from distopt.optim import DistributedOptimizer, StepInfo
from distopt.reduce import DisagreementError, DriftError, PeerError
from distopt.train.components import make_loggers, make_loss, make_optimizer, refused
from distopt.train.loggers import FILE_NAME, Logger, Loggers, RunInfo, printer, read_metrics
from distopt.train.monitor import PaceMeter, RankPace, Status, describe_straggler
from distopt.train.recorded_config import recorded_config
from distopt.train.report import Report, elbo_figure, paces_table
from distopt.train.resume import describe_restored, which_checkpoint
from distopt.train.serve import ServeError, serving
from distopt.train.setup import count_rows, load_task_on_all_ranks, set_up_process
from distopt.train.signals import StopSignals
from distopt.train.task import TaskError, TaskRows

REPORT = "report.html"

# Rows that the parameters are made from. A guide's first call needs some rows, and all of them might not fit in memory.
_INIT_ROWS = 1024

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
        self.refusal: str | None = None  # why steps are not captured, once it has been printed
        callables = {"model": self.task.model, "guide": self.task.guide}
        self.modules = {name: each for name, each in callables.items() if isinstance(each, nn.Module)}

        self.skipped_in_row = 0
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
            last_step = self._train(first_step, checkpointer)
            checkpointer.wait()

        if last_step < self.config.train.num_steps:
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
        except Exception as error:
            self.optimizer.abort(error)
            raise
        # What methods of the task register by `pyro.module` is computed with as well.
        self.modules |= RegisteredModules(self.modules).find()
        self.optimizer.synchronize(modules=self.modules.values())

    def _make_checkpointer(self) -> Checkpointer:
        config = self.config
        return Checkpointer(
            config.run_dir / CHECKPOINTS,
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
            for line in describe_restored(restored, config, self.backend.world_size, is_new=is_new):
                self.print(line)
            self.status.checkpoint_at = time.monotonic()

        self.status.step = first_step
        self.status.joined = True
        self.status.progress()
        return first_step

    def _make_loggers(self, first_step: int) -> Loggers:
        """Makes the loggers of rank 0; on other ranks there is only the status, which every rank serves."""
        config = self.config
        loggers: list[Logger] = [self.status]
        if self.console is not None:
            loggers += make_loggers(config, self.console)
        dumped = config.model_dump(mode="json")
        return Loggers(loggers, RunInfo(config.name, config.run_dir, first_step, config.train.num_steps, dumped))

    # The steps.

    def _train(self, first_step: int, checkpointer: Checkpointer) -> int:
        """Takes the steps after `first_step`; returns how many the run has done when it ends or is stopped."""
        num_steps = self.config.train.num_steps
        num_ahead = self.config.data.prefetch
        window = _Window()
        with (
            self._make_loggers(first_step) as loggers,
            Loader(TaskRows(self.task), self.batches, num_ahead=num_ahead) as loader,
        ):
            for step in range(first_step + 1, num_steps + 1):
                is_last = step == num_steps
                is_logged = is_last or step % self.config.log.every_steps == 0
                info = self._step(step, loader, measure_norm=is_logged)
                window.add(info)
                self._report_refusal(step)
                loggers.after_step(step)
                if is_logged:
                    loggers.log(step, self._measure(info, window))

                self.status.checkpoint_at = checkpointer.committed_at or self.status.checkpoint_at
                if info.stop or is_last or self._is_save_due(step):
                    self._save(checkpointer, step)
                if info.stop:
                    return step

        if first_step >= num_steps:
            self.print(f"all {num_steps:,} steps were done before")
        self.status.progress()
        return max(first_step, num_steps)

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
            info = self.svi.step_with(batch, step=index, stop=stop, measure_norm=measure_norm)
            if scheduler is not None and step % scheduler.every_steps == 0:
                self.step_schedule(self.optimizer, info.loss)
        self._count_skipped(step)
        return info

    def _count_skipped(self, step: int) -> None:
        """Notes whether the step was skipped, as it is on all ranks at once, and ends a run that skips all."""
        num_skipped = self.optimizer.num_skipped_steps
        self.skipped_in_row = self.skipped_in_row + 1 if num_skipped > self.status.skipped_steps else 0
        self.status.skipped_steps = num_skipped
        if self.skipped_in_row >= self.config.optim.max_skipped_in_row:
            raise TaskError(
                f"step {step:,}: the last {self.skipped_in_row:,} steps were skipped, since gradients were not finite "
                f"({', '.join(self.optimizer.nonfinite_names[:5])}); the log names the ranks. The parameters are still "
                "finite. Lower optim.args.lr, set optim.clip, or change the model; optim.max_skipped_in_row sets how "
                "many are skipped."
            )

    def _report_refusal(self, step: int) -> None:
        """Says once, on rank 0, that steps are not captured and why."""
        captured = self.svi.captured
        if captured is not None and captured.refusal is not None and self.refusal is None:
            self.refusal = captured.refusal
            self.print(f"step {step:,}: steps are not captured and run as with train.capture=off: {self.refusal}")

    def _measure(self, info: StepInfo, window: _Window) -> dict[str, float]:
        """Returns the values for the loggers: those of the window, which ends here, and those of its last step."""
        loss, steps_per_s = window.close()
        norm = info.gradient_norm
        self.status.all_reduce_s = self.backend.all_reduce_s
        self.status.all_reduce_bytes = self.backend.all_reduce_bytes
        return {
            "elbo": -loss,
            "rows_per_s": steps_per_s * self.batches.global_batch,
            "gradient_norm": math.nan if norm is None else norm,
            "skipped_steps": self.status.skipped_steps,
        }

    def _is_save_due(self, step: int) -> bool:
        every_steps = self.config.checkpoint.every_steps
        return every_steps is not None and step % every_steps == 0

    def _save(self, checkpointer: Checkpointer, step: int) -> None:
        """Saves a checkpoint, and reports a rank that has become a straggler since the last one."""
        began_s = time.monotonic()
        checkpointer.save(step)
        self.status.checkpoint_s = time.monotonic() - began_s

        previous = describe_straggler(self.paces)
        self.paces = self.pace.all_ranks()
        straggler = describe_straggler(self.paces)
        if straggler and not previous:
            self.print(f"step {step:,}: {straggler}")

    # After the last step.

    def _write_report(self) -> None:
        """Writes the report, on rank 0: the task's results, the ELBO, the ranks' paces, the configuration."""
        config = self.config
        history = read_metrics(config.run_dir)
        report = Report(config.name, self.console, history)
        seed_all(config.seed, config.train.num_steps)
        with torch.no_grad():
            self.task.report(report)

        report.heading("How the ELBO rose")
        try:
            figure = elbo_figure(history, self.batches.num_rows)
        except ImportError:
            report.text(
                f"There is no figure without matplotlib: pip install matplotlib. The numbers are in {FILE_NAME}."
            )
        else:
            report.figure(figure, "Evidence lower bound per row, mean over the ranks.")
        if self.paces:
            paces_table(report, self.paces)
        report.source("The configuration", dump_yaml(config))

        path = config.run_dir / REPORT
        try:
            report.write(path)
        except OSError as error:
            self.print(f"no report: {path} cannot be written: {error.strerror}")
        else:
            self.print(f"report: {path}")


class _Window:
    """The steps since the last logged one: their mean loss and their speed."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._since_s = time.monotonic()

    def add(self, info: StepInfo) -> None:
        """Adds a step."""
        assert info.loss is not None
        self._losses.append(info.loss)

    def close(self) -> tuple[float, float]:
        """Returns the mean loss and the steps per second, and starts the next window."""
        now_s = time.monotonic()
        num_steps = len(self._losses)
        loss = sum(self._losses) / num_steps
        steps_per_s = num_steps / max(now_s - self._since_s, 1e-9)
        self._losses = []
        self._since_s = now_s
        return loss, steps_per_s

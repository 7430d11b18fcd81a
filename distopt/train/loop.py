"""The training loop: what each worker of a run does, from joining the others to the last checkpoint."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pyro
import torch
from rich.console import Console
from torch import nn

from distopt.backends import Backend, BackendError, init
from distopt.checkpoint import CheckpointError
from distopt.checkpoint.module_state import RegisteredModules
from distopt.config import ConfigError, RunConfig
from distopt.data import GlobalBatches, Loader
from distopt.infer import SVI, seed_all
from distopt.infer.capture.modes import is_checked_late
from distopt.launchers import LauncherError, find_rank
from distopt.optim import DistributedOptimizer, StepInfo
from distopt.reduce import DisagreementError, DriftError, PeerError
from distopt.train.components import capture_mode, in_precision, make_loss, make_optimizer, make_scaler, refused
from distopt.train.loggers import printer
from distopt.train.monitor import Status
from distopt.train.plate_check import check_plates
from distopt.train.serve import ServeError, serving
from distopt.train.session import Session
from distopt.train.setup import device_of_run, load_task_on_all_ranks, make_batches, set_up_process
from distopt.train.signals import StopSignals
from distopt.train.task import TaskError, TaskRows
from distopt.worker_error import is_permanent, record_error

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
        self.device = device_of_run(config, backend)
        self.moved_to = self.device if config.train.device else None  # else the task places its tensors by itself
        with self.moved_to or nullcontext():
            self.task = load_task_on_all_ranks(config, backend)
        self.batches = make_batches(self.task, config, backend)

        scaler = make_scaler(config, self.device)
        optimizer, self.step_schedule = make_optimizer(config, scaler)
        with refused("reduce"):
            self.optimizer = DistributedOptimizer(
                optimizer,
                backend=backend,
                reduce=config.reduce,
                noise=config.train.noise,
            )
        loss = in_precision(make_loss(config), config, self.device, scaler)
        capture = capture_mode(config, self.device)
        self.svi = SVI(
            self.task.model,
            self.task.guide,
            self.optimizer,
            loss,
            weight=self.batches.weight,
            capture=capture,
            compile_from_step=config.train.compile_from_step if capture == "auto" else None,
        )
        self.gradient_norm: float | None = None  # of the last step
        self.refusal: str | None = None  # why steps are not captured, once it has been printed
        self.notice: str | None = None  # likewise why they are not compiled
        callables = {"model": self.task.model, "guide": self.task.guide}
        self.modules = {name: each for name, each in callables.items() if isinstance(each, nn.Module)}
        if self.moved_to is not None:
            for module in self.modules.values():
                module.to(self.moved_to)

        self.skipped = _SkippedSteps(config.optim.max_skipped_in_row)

    def run(self) -> int:
        """Trains to the end or to a signal; returns the exit status."""
        self._announce()
        self._make_parameters()
        session = self._make_session()
        with session, self._make_loader() as loader:
            for index in session.steps():
                info = self._step(index, loader, session)
                session.note_stop(info.stop)

        if not session.is_done:
            return session.exit_status
        self.task.collect()
        session.write_report(self.task, self.batches.num_rows)
        self.backend.barrier()
        return 0

    # Before the first step.

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
            self.svi.init(*TaskRows(self.task, self.moved_to).read(rows))
            takes_all_rows = self.batches.full and self.backend.world_size == 1
            if not self.task.sharded and not takes_all_rows:
                check_plates(self.task, rows, self.batches.num_rows, device=self.moved_to)
        except Exception as error:
            self.optimizer.abort(error)
            raise
        # What methods of the task register by `pyro.module` is computed with as well.
        self.modules |= RegisteredModules(self.modules).find()
        self.optimizer.synchronize(modules=self.modules.values())

    def _make_session(self) -> _TaskSession:
        scaler = self.optimizer.scaler
        saved = {"optimizer": self.optimizer, **self.modules} | ({} if scaler is None else {"scaler": scaler})
        return _TaskSession(self, saved)

    def _make_loader(self) -> Loader:
        return Loader(TaskRows(self.task), self.batches, device=self.moved_to, num_ahead=self.config.data.prefetch)

    # The steps.

    def _step(self, index: int, loader: Loader, session: Session) -> StepInfo:
        """Takes a step, counted from 0; returns what the ranks learned from each other in it."""
        config = self.config
        step = index + 1
        batch = loader.batch(index)
        stop = self.stop.received != 0
        is_checked = self._is_checked(step, session.first_step)
        is_logged = session.is_logged(step)
        with pyro.validation_enabled(is_checked):
            info = self.svi.step_with(batch, step=index, stop=stop, measure_norm=is_logged, is_checked=is_checked)
        scheduler = config.optim.scheduler
        if scheduler is not None and step % scheduler.every_steps == 0:
            self.step_schedule(self.optimizer, info.loss)

        self.status.skipped_steps = self.skipped.count(step, self.optimizer)
        self._report_refusal(step)
        self._note_keys(step, session)
        assert info.loss is not None
        session.log(elbo=-info.loss)
        self.gradient_norm = info.gradient_norm
        return info

    def _is_checked(self, step: int, first_step: int) -> bool:
        """Returns whether Pyro checks arguments, supports and shapes in this step; that changes no number."""
        num_first = self.config.train.check_steps
        return num_first is None or step <= first_step + num_first or is_checked_late(step)

    def _report_refusal(self, step: int) -> None:
        """Says once, on rank 0, that steps are not captured or not compiled, and why."""
        captured = self.svi.captured
        if captured is None:
            return
        if captured.refusal is not None and self.refusal is None:
            self.refusal = captured.refusal
            self.print(f"step {step:,}: steps are not captured and run as with train.capture=off: {self.refusal}")
        elif captured.notice is not None and self.refusal is None and self.notice is None:
            self.notice = captured.notice
            self.print(f"step {step:,}: steps are not compiled and run as with train.capture=graph: {self.notice}")

    def _note_keys(self, step: int, session: Session) -> None:
        """Saves how steps are compiled, and says whether that is otherwise than before the run resumed."""
        keys = dict.fromkeys(() if self.svi.captured is None else self.svi.captured.keys)
        known = session.progress.get("compiled", [])
        new = [key for key in keys if key not in known]
        if known and step == session.first_step + 1 and (new or not keys):
            self.print(
                f"step {step:,}: steps are not compiled as they were before the run resumed (key {', '.join(known)}, "
                f"now {', '.join(new) or 'none'}): train.capture, the machine, torch or the number of threads is "
                "another one. Rounding may differ from that of a run that was never stopped."
            )
        if new:
            session.progress["compiled"] = [*known, *new]

    def measure(self) -> dict[str, float]:
        """Returns further values for the loggers; those of the task on rank 0 alone, where the loggers are."""
        norm = self.gradient_norm
        rates = self.optimizer.optim.learning_rates()
        values: dict[str, float] = {
            "gradient_norm": math.nan if norm is None else norm,
            "skipped_steps": self.status.skipped_steps,
            **({"lr": max(rates)} if rates else {}),
        }
        if self.backend.rank != 0:
            return values

        with torch.no_grad():
            more = {name: float(value) for name, value in self.task.metrics().items()}
        logged = {"elbo", "rows_per_s", "train_s", *values}
        if logged & more.keys():
            raise TaskError(f"task: metrics() returned {', '.join(logged & more.keys())}, which distopt logs")
        return values | more


class _TaskSession(Session):
    """The session of a task, whose signals and state `run` has from before the ranks have met."""

    ends_process = False

    def __init__(self, worker: _Worker, saved: Mapping[str, Any]) -> None:
        rows, validate = worker.batches.global_batch, worker.task.validate
        super().__init__(saved, config=worker.config, rows_per_step=rows, validate=validate)
        self.status = worker.status
        self.stop = worker.stop
        self._more = worker.measure


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

"""The training loop: what each worker of a run does, from joining the others to the last checkpoint."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.infer
import torch
from rich.console import Console
from torch import nn

import distopt.optim
from distopt.backends import Backend, BackendError, init
from distopt.checkpoint import Checkpointer, CheckpointError, Restored
from distopt.config import ConfigError, RunConfig, differences
from distopt.data import GlobalBatches, Loader
from distopt.infer import SVI, seed_noise
from distopt.launchers import CHECKPOINTS, LauncherError, find_rank
from distopt.optim import DistributedOptimizer, PyroLRScheduler, PyroOptim, StepInfo
from distopt.reduce import DisagreementError, DriftError, PeerError
from distopt.train.loggers import FILE_NAME, Metrics, StepProgress, printer, read_metrics
from distopt.train.monitor import Pace, RankPace, Status, describe_straggler
from distopt.train.report import Report, elbo_figure, paces_table
from distopt.train.serve import ServeError, serving
from distopt.train.signals import StopSignals
from distopt.train.task import Task, TaskError, TaskRows, load_task

REPORT = "report.html"
_INIT_ROWS = 1024
# What a user mends by reading one line; anything else is a defect and shows where it happened.
_SHARED_ERRORS = (BackendError, PeerError, DisagreementError, DriftError)
_PLAIN_ERRORS = (*_SHARED_ERRORS, ConfigError, LauncherError, TaskError, CheckpointError, ServeError)


def run(config: RunConfig) -> int:
    """Trains the task of `config` as one of its workers; every rank calls it.

    The run goes on from the newest good checkpoint in `run_dir/checkpoints` unless the config says otherwise. SIGTERM
    and Ctrl-C let the step end, write a last checkpoint and stop all ranks at the same step. While a rank waits for the
    others at the start, they end it at once.

    Returns:
        0 when all steps are done, 143 after SIGTERM, 130 after Ctrl-C, 1 on an error, which has been printed.

    Cost:
        One all-reduce a step.
    """
    backend: Backend | None = None
    try:
        status, rank_info = Status(), find_rank()
        # Served before the ranks have met: waiting for the others is when one wants to ask.
        with StopSignals() as stop, serving(config.serve, status, (rank_info and rank_info.local_rank) or 0):
            backend = init(config.reduce.backend, timeout=timedelta(seconds=config.reduce.timeout_s))
            stop.hold()
            return _Worker(config, backend, status, stop).run()
    except Exception as error:
        if backend is not None and not isinstance(error, _SHARED_ERRORS):
            backend.fail(error)  # the others wait for this rank, and raise this cause instead
        if not isinstance(error, _PLAIN_ERRORS):
            raise
        who = f"rank {backend.rank} of {backend.world_size}: " if backend is not None else ""
        print(f"distopt: {who}{error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if backend is not None:
            backend.close()


class _Worker:
    """One rank of a run."""

    def __init__(self, config: RunConfig, backend: Backend, status: Status, stop: StopSignals) -> None:
        self.config, self.backend, self.status, self.stop = config, backend, status, stop
        self.console = Console() if backend.rank == 0 else None
        self.say: Callable[[str], None] = printer(self.console)
        self.task = self._make_task()
        with refused("data"):
            self.batches = GlobalBatches(
                self._count_rows(), config.data.global_batch, config.seed, backend.rank, backend.world_size
            )
        if getattr(self.task, "sharded", False) and not self.batches.full:
            raise TaskError(
                f"data.global_batch is {self.batches.global_batch:,}, but {config.task} keeps its rows on their ranks "
                "and takes all of them at each step: set it to null"
            )
        wrapped, self.step_schedule = make_optimizer(config)
        wrapped.nonfinite = config.optim.nonfinite
        with refused("reduce"):
            self.optimizer = DistributedOptimizer(
                wrapped,
                backend=backend,
                reduce=config.reduce,
                noise=config.train.noise,
            )
        with refused("train.loss_args"):
            loss = getattr(pyro.infer, config.train.loss)(
                num_particles=config.train.num_particles, **config.train.loss_args
            )
        self.svi = SVI(self.task.model, self.task.guide, self.optimizer, loss, weight=self.batches.weight)
        named = {"model": self.task.model, "guide": self.task.guide}
        self.pace, self.paces = Pace(backend), list[RankPace]()
        self.modules = {name: module for name, module in named.items() if isinstance(module, nn.Module)}

    def run(self) -> int:
        config = self.config
        self._say_what_runs()
        self._begin()
        with refused("run_dir", (OSError,)):
            config.run_dir.mkdir(parents=True, exist_ok=True)
        with Checkpointer(
            config.run_dir / CHECKPOINTS,
            optimizer=self.optimizer,
            modules=self.modules,
            backend=self.backend,
            config=config.model_dump(mode="json"),
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
        ) as checkpointer:
            restored = checkpointer.restore(_which(config.checkpoint.resume))
            first = self._after_restore(restored)
            stopped_at = self._steps(first, checkpointer)
            checkpointer.wait()
        if stopped_at < config.train.num_steps:
            self.say(f"stopped after step {stopped_at:,}; the same command goes on from there")
            return 128 + (self.stop.received or signal.SIGTERM)
        if hasattr(self.task, "collect"):
            self.task.collect()
        if self.backend.rank == 0:
            self._report()
        self.backend.barrier()
        return 0

    def _make_task(self) -> Task:
        """Builds the task; an error on any rank is told by all of them."""
        cores = len(os.sched_getaffinity(0))
        hosts = self.backend.all_gather_json(self.backend.node_rank)
        torch.set_num_threads(max(1, cores // hosts.count(self.backend.node_rank)))
        pyro.clear_param_store()
        seed_noise(self.config.seed)
        error, task = None, None
        try:
            task = load_task(self.config.task or "", self.config.task_args)
        except (ConfigError, TaskError) as problem:
            error = str(problem)
        told = self.backend.all_gather_json({"error": error, "setup": setup_of(self.config)})
        if task is None or any(each["error"] for each in told):
            raise TaskError(next(each["error"] for each in told if each["error"]))
        for rank, each in enumerate(told):
            found = differences(told[0]["setup"], each["setup"])
            lines = [f"{key}: {first!r} on rank 0, {own!r} on rank {rank}" for key, first, own in found]
            if lines:
                raise TaskError("\n  ".join(["the ranks would not compute the same thing:", *lines]))
        return task

    def _count_rows(self) -> int:
        """The number of rows, which all ranks must find alike: which of them a rank reads follows from it."""
        counts: list[int] = self.backend.all_gather_json(int(self.task.rows()))
        if len(set(counts)) > 1:
            rank = next(rank for rank, count in enumerate(counts) if count != counts[0])
            raise TaskError(
                f"task: rows() is {counts[0]:,} on rank 0 and {counts[rank]:,} on rank {rank}; every rank must have "
                "the whole training set, of which it is asked for its part by batch()"
            )
        return counts[0]

    def _begin(self) -> None:
        """Makes the parameters, from the same rows and noise on all ranks; of a sharded task, from each rank's own."""
        seed_noise(self.config.seed)
        if getattr(self.task, "sharded", False):
            rows = self.batches.rows(0)
        else:
            # Not all rows where a step takes all, and never more than a step: it would not fit in memory, maybe.
            num_rows = min(_INIT_ROWS, self.batches.global_batch)
            rows = GlobalBatches(self.batches.num_rows, num_rows, self.config.seed).rows(0)
        try:
            self.svi.init(*TaskRows(self.task).read(rows))
        except Exception as error:
            self.optimizer.abort(error)
            raise
        self.optimizer.synchronize(modules=self.modules.values())

    def _say_what_runs(self) -> None:
        world, config = self.backend, self.config
        several = f"{world.world_size} workers over {world.name}" if world.world_size > 1 else "one worker"
        self.say(
            f"{config.name}: {config.task} on {several}, {self.batches.num_rows:,} rows, "
            f"{self.batches.global_batch:,} a step, {config.train.num_steps:,} steps of {config.optim.name}"
        )

    def _after_restore(self, restored: Restored | None) -> int:
        first = restored.step if restored is not None else 0
        if restored is not None:
            workers = "" if restored.world_size == self.backend.world_size else f", written by {restored.world_size}"
            self.say(f"going on after step {first:,} from {restored.path}{workers}")
            self.status.checkpoint_at = time.monotonic()
        self.status.step, self.status.joined = first, True
        self.status.progress()
        return first

    def _steps(self, first: int, checkpointer: Checkpointer) -> int:
        """Takes the steps from `first` on; returns how many the run has done."""
        config, status = self.config, self.status
        num_steps, every = config.train.num_steps, config.checkpoint.every_steps
        log = _Log(self, first)
        with log, Loader(TaskRows(self.task), self.batches, num_ahead=config.data.prefetch) as loader:
            for step in range(first, num_steps):
                is_logged = (step + 1) % config.log.every_steps == 0 or step + 1 == num_steps
                info = self._step(step, loader, measure_norm=is_logged)
                log.after(step + 1, info, is_logged)
                status.checkpoint_at = checkpointer.committed_at or status.checkpoint_at
                if info.stop or step + 1 == num_steps or (every is not None and (step + 1) % every == 0):
                    self._save(checkpointer, step + 1)
                if info.stop:
                    return step + 1
        if first >= num_steps:
            self.say(f"all {num_steps:,} steps were done before")
        status.progress()
        return max(first, num_steps)

    def _step(self, step: int, loader: Loader, *, measure_norm: bool) -> StepInfo:
        config, optimizer = self.config, self.optimizer
        seed_noise(config.seed, step, self.backend.rank, config.train.noise)
        scheduler = config.optim.scheduler
        with self.pace.step():
            batch, stop = loader.batch(step), self.stop.received != 0
            info = self.svi.step_with(batch, step=step, stop=stop, measure_norm=measure_norm)
            if scheduler is not None and (step + 1) % scheduler.every_steps == 0:
                self.step_schedule(optimizer, info.loss)
        self.status.skipped_steps = optimizer.num_skipped_steps
        self.status.finish_step(step + 1)
        return info

    def _save(self, checkpointer: Checkpointer, step: int) -> None:
        began = time.monotonic()
        checkpointer.save(step)
        self.status.checkpoint_s = time.monotonic() - began
        before, self.paces = describe_straggler(self.paces), self.pace.gather()
        straggler = describe_straggler(self.paces)
        if straggler and not before:
            self.say(f"step {step:,}: {straggler}")

    def _report(self) -> None:
        """Writes the report on rank 0: the task's part, the ELBO, the config."""
        config = self.config
        history = read_metrics(config.run_dir)
        report = Report(config.name, self.console, history)
        seed_noise(config.seed, config.train.num_steps)
        with torch.no_grad():
            self.task.report(report)
        report.heading("How the ELBO rose")
        try:
            figure = elbo_figure(history, self.batches.num_rows)
        except ImportError:
            report.text(f"There is no picture without matplotlib: pip install matplotlib. {FILE_NAME} has the numbers.")
        else:
            report.figure(figure, "Evidence lower bound per row, mean over the ranks.")
        if self.paces:
            paces_table(report, self.paces)
        from distopt.config import dump_yaml

        report.source("The configuration", dump_yaml(config))
        path = config.run_dir / REPORT
        report.write(path)
        self.say(f"report: {path}")


class _Log:
    """What rank 0 tells of the steps: the bar, `metrics.jsonl`, TensorBoard; and the status that is served."""

    def __init__(self, worker: _Worker, first: int) -> None:
        self._worker, self._since = worker, time.monotonic()
        self._losses: list[float] = []  # since the last row
        config, console = worker.config, worker.console
        self._metrics = self._bar = None
        if console is not None:
            self._metrics = Metrics(config.run_dir, first, tensorboard=config.log.tensorboard)
            self._bar = StepProgress(console, first, config.train.num_steps)

    def __enter__(self) -> _Log:
        if self._bar is not None:
            self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None and self._metrics is not None:
            self._bar.__exit__(*error)
            self._metrics.close()

    def after(self, step: int, info: StepInfo, is_logged: bool) -> None:
        """Notes that `step` steps are done."""
        assert info.loss is not None
        self._losses.append(info.loss)
        if self._bar is not None:
            self._bar.advance(step)
        if is_logged:
            self._measured(step, info.gradient_norm)

    def _measured(self, step: int, gradient_norm: float | None) -> None:
        worker, now = self._worker, time.monotonic()
        steps_per_s = len(self._losses) / max(now - self._since, 1e-9)
        loss = sum(self._losses) / len(self._losses)
        self._since, self._losses = now, []
        status = worker.status
        status.loss, status.gradient_norm = loss, gradient_norm
        status.rows_per_s = steps_per_s * worker.batches.global_batch
        status.all_reduce_s, status.all_reduce_bytes = worker.backend.all_reduce_s, worker.backend.all_reduce_bytes
        if self._bar is None or self._metrics is None:
            return
        self._bar.measured(step, -loss, status.rows_per_s, steps_per_s)
        self._metrics.write(
            step,
            elbo=-loss,
            rows_per_s=status.rows_per_s,
            gradient_norm=status.gradient_norm if status.gradient_norm is not None else np.nan,
            skipped_steps=status.skipped_steps,
        )


def make_optimizer(config: RunConfig) -> tuple[PyroOptim, Callable[[DistributedOptimizer, float | None], None]]:
    """Returns the optimizer that the config names, and what steps its schedule with the loss of the step.

    Raises:
        TaskError: `distopt.optim` has no such optimizer or schedule, or it does not take the arguments.
    """
    chosen, scheduler = config.optim, config.optim.scheduler
    clip, args = chosen.clip.args(), dict(chosen.args)
    constructor = _named(chosen.name, "optim.name")({}).pt_optim_constructor
    with refused("optim.args"):
        optimizer = PyroOptim(constructor, args, clip)
        constructor([torch.zeros(1)], **args)  # else the first step would be the first to know
    if scheduler is None:
        return optimizer, lambda _optimizer, _loss: None
    make = _named(scheduler.name, "optim.scheduler.name")
    with refused("optim.scheduler"):
        optimizer = make({"optimizer": constructor, "optim_args": args, **scheduler.args}, clip)
        if not isinstance(optimizer, PyroLRScheduler):
            raise ValueError(f"{scheduler.name} is an optimizer and no schedule")
        optimizer._construct([torch.zeros(1)], args)
    if scheduler.name == "ReduceLROnPlateau":
        return optimizer, lambda made, loss: made.step(loss)
    return optimizer, lambda made, _loss: made.step()


def setup_of(config: RunConfig) -> dict[str, Any]:
    """Returns what must be equal on all ranks lest they train different things: config, the task's code, versions."""
    file = getattr(sys.modules.get((config.task or "").partition(":")[0]), "__file__", None)
    return {
        "config": config.model_dump(mode="json", exclude={"launch", "log", "run_dir", "serve"}),
        "SHA-256 of the task's file": file and hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        "version": {"torch": str(torch.__version__), "pyro": pyro.__version__, "distopt": distopt.__version__},
    }


@contextmanager
def refused(key: str, kinds: tuple[type[Exception], ...] = (TypeError, ValueError)) -> Iterator[None]:
    """Turns what a library says of a value in the config into a `TaskError` that names the value's key."""
    try:
        yield
    except kinds as error:
        raise TaskError(f"{key}: {error}") from error


def _named(name: str, key: str) -> Any:
    found = getattr(distopt.optim, name, None)
    if found is None:
        raise TaskError(f"{key}: found {name}, but distopt.optim has none of that name")
    return found


def _which(resume: int | str) -> Any:
    return int(resume) if isinstance(resume, str) and resume.isdigit() else resume

"""`load_run`: what a run has found, in a notebook or a script, also while it trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike, NDArray
from pyro import poutine
from torch import Tensor, nn

from distopt.backends.single import Single
from distopt.checkpoint import CheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import Candidate
from distopt.checkpoint.restore import Loaded, Request, apply_loaded, choose, read_on_all_ranks
from distopt.checkpoint.run_state import RunState
from distopt.checkpoint.sharded_params import ShardedReader
from distopt.checkpoint.storage.base import Storage, open_storage
from distopt.config import RunConfig, checkpoints_of
from distopt.infer import SVI
from distopt.launchers import RUNS
from distopt.optim import Adam
from distopt.run_files import read_facts, read_metrics
from distopt.train.components import make_loss
from distopt.train.task import Task, TaskError, TaskRows, load_task

_NUM_TRIES = 3  # a run that trains may delete a checkpoint while it is read
_INIT_ROWS = 1024


def load_run(run: str | Path, *, checkpoint: Literal["newest", "best"] | int = "newest") -> SavedRun:
    """Returns a run of a YAML with its trained parameters; nothing in its directory is locked or written.

    The parameters are put into Pyro's parameter store, too, as `pyro.get_param_store().load` would, so that
    `run.model` and `run.guide` can be called. With several runs, call them inside `with run.store():`.

    Args:
        run: The run directory, or the name of a run in `runs/`.
        checkpoint: `newest` is the newest good checkpoint, `best` the one that `checkpoint.keep_best` has kept; or a
            step.

    Raises:
        CheckpointError: There is no such run or checkpoint, or it cannot be read.
        TaskError: The run is one of a script, which has no task.

    Example:
        >>> import distopt
        >>> run = distopt.load_run("runs/sales")  # doctest: +SKIP
        >>> run.predictive(num_samples=200, rows=[0, 1])["sales"].mean(0)  # doctest: +SKIP
    """
    run_dir = next((each for each in (Path(run), Path(RUNS) / run) if _has_checkpoints(each)), None)
    if run_dir is None:
        known = ", ".join(sorted(each.name for each in Path(RUNS).glob("*") if _has_checkpoints(each))) or "none"
        raise CheckpointError(f"{run}: no run with checkpoints, and {RUNS}/ has: {known}")
    return SavedRun(run_dir, checkpoint)


class SavedRun:
    """A run as one of its checkpoints has it; see `load_run`.

    Args:
        run_dir: The run directory.
        checkpoint: Which checkpoint.

    Attributes:
        run_dir: As given.
        config: The configuration with which the checkpoint was saved.
        step: Steps that were done then.
        task: The task, built anew.
        model: Its model; sharded plates hold all datapoints, by global index.
        guide: Its guide, with the trained parameters.
        params: Constrained parameters by name, detached.
        facts: When, with what and how the run went (`run.json`).
    """

    def __init__(self, run_dir: Path, checkpoint: str | int = "newest") -> None:
        self.run_dir = run_dir
        storage, candidate = _choose(run_dir, checkpoint)
        manifest = candidate.manifest
        assert manifest is not None
        self.config: RunConfig = _config_of(manifest, run_dir)
        self.step: int = manifest.step
        if self.config.task is None:
            raise TaskError(f"{run_dir} is the run of a script ({self.config.script}); load_run needs one of a task")

        self._state: dict[str, Any] = {"params": {}, "constraints": {}}
        with self.store(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.task: Task = load_task(self.config.task, self.config.task_args)
            # One batch of the model with its data makes a guide's prototype: one made by a model without would take
            # what is observed for latent.
            svi = SVI(self.task.model, self.task.guide, Adam({"lr": 0.0}), make_loss(self.config))
            svi.init(*self._batch(None if self.task.sharded else np.arange(min(self.task.rows(), _INIT_ROWS))))
            self.guide: Any = self.task.guide
            self.model: Any = self.task.model
            self._wrapped = (svi.model, svi.guide)
            self._load(storage, candidate)
            self.params: dict[str, Tensor] = {
                name: value.detach().clone() for name, value in pyro.get_param_store().items()
            }
        self.facts: dict[str, Any] = read_facts(run_dir)
        pyro.get_param_store().set_state(self._state)

    def _load(self, storage: Storage, candidate: Candidate) -> None:
        backend = Single()
        callables = {"model": self.task.model, "guide": self.task.guide}
        modules = {name: each for name, each in callables.items() if isinstance(each, nn.Module)}
        loaded, problem = _read(storage, candidate, backend)
        if loaded is None:
            raise CheckpointError(problem)
        apply_loaded(loaded, RunState(modules, {}), backend, Request(only=("params",)))

    @contextmanager
    def store(self) -> Iterator[None]:
        """Puts this run's parameters into Pyro's store for the block, and what was there before back after it."""
        with pyro.get_param_store().scope(self._state) as self._state:
            yield

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """What the run has logged, oldest first."""
        return read_metrics(self.run_dir)

    @cached_property
    def metrics(self) -> Any:
        """What the run has logged: a pandas DataFrame by step, or a list of dicts where pandas is not installed."""
        rows = self.history
        try:
            import pandas as pd
        except ImportError:
            return rows
        return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame()

    def samples(
        self,
        num_samples: int = 500,
        *,
        rows: ArrayLike | None = None,
        sites: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Returns samples of the guide, by name of the latent site.

        Args:
            num_samples: How many.
            rows: (num_rows,) rows of the data; None takes all.
            sites: Which latent sites; None returns all.
            seed: Of the samples; None takes that of the run.

        Returns:
            (num_samples, ...) each. In a sharded plate the dimension of the datapoints is that of `rows`.
        """
        with self._sampling(seed):
            batch = self._batch(rows)
            model, guide = self._wrapped
            shapes = poutine.trace(model).get_trace(*batch)
            chosen = [name for name in sites or shapes.stochastic_nodes if not _is_helper(shapes.nodes[name])]
            drawn = [poutine.trace(guide).get_trace(*batch) for _ in range(num_samples)]
            stacked = {name: torch.stack([each.nodes[name]["value"] for each in drawn]) for name in chosen}
        return {name: self._of_rows(value, shapes.nodes[name], rows) for name, value in stacked.items()}

    def posterior(
        self,
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        *,
        num_samples: int = 1000,
        rows: ArrayLike | None = None,
        sites: Sequence[str] | None = None,
    ) -> dict[str, dict[float, Tensor]]:
        """Returns quantiles of the guide's samples, by site and quantile.

        Args:
            quantiles: In [0, 1].
            num_samples: How many samples they are computed from.
            rows: As for `samples`.
            sites: As for `samples`.
        """
        drawn = self.samples(num_samples, rows=rows, sites=sites)
        return {
            name: {each: torch.from_numpy(np.asarray(np.quantile(value.numpy(), each, axis=0))) for each in quantiles}
            for name, value in drawn.items()
        }

    def predictive(
        self,
        num_samples: int = 100,
        *,
        rows: ArrayLike | None = None,
        sites: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """Returns samples of the posterior predictive distribution: what the model would observe.

        Args:
            num_samples: How many.
            rows: (num_rows,) rows of the data whose covariates are used; None takes all.
            sites: Which sites; None returns those that the model observes.
            seed: Of the samples; None takes that of the run.

        Returns:
            (num_samples, ...) each.
        """
        with self._sampling(seed):
            batch = self._batch(rows)
            model, guide = self._wrapped
            shapes = poutine.trace(model).get_trace(*batch)
            chosen = list(sites or shapes.observation_nodes)
            # Not Pyro's Predictive: its samples have further dimensions in front, and `season[0]` is another number.
            free = poutine.uncondition(model)
            drawn = []
            for _ in range(num_samples):
                latent = poutine.trace(guide).get_trace(*batch)
                drawn.append(poutine.trace(poutine.replay(free, trace=latent)).get_trace(*batch))
            stacked = {name: torch.stack([each.nodes[name]["value"] for each in drawn]) for name in chosen}
        return {name: self._of_rows(value, shapes.nodes[name], rows) for name, value in stacked.items()}

    def to_arviz(self, num_samples: int = 500, *, rows: ArrayLike | None = None) -> Any:
        """Returns samples of posterior and posterior predictive and the observed data as ArviZ has them.

        Args:
            num_samples: How many samples, as one chain.
            rows: As for `samples`.

        Raises:
            ModuleNotFoundError: ArviZ is not installed.
        """
        try:
            import arviz
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_arviz() needs ArviZ: pip install arviz") from error
        with self._sampling(None):
            observed = poutine.trace(self._wrapped[0]).get_trace(*self._batch(rows))
        groups = {
            "posterior": _one_chain(self.samples(num_samples, rows=rows)),
            "posterior_predictive": _one_chain(self.predictive(num_samples, rows=rows)),
            "observed_data": {
                name: self._of_rows(observed.nodes[name]["value"][None], observed.nodes[name], rows)[0].numpy()
                for name in observed.observation_nodes
            },
        }
        # ArviZ 1 takes a mapping of groups, 0.x a keyword for each.
        return arviz.from_dict(groups) if int(arviz.__version__.partition(".")[0]) else arviz.from_dict(**groups)

    @contextmanager
    def _sampling(self, seed: int | None) -> Iterator[None]:
        with self.store(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed if seed is None else seed)
            yield

    def _batch(self, rows: ArrayLike | None) -> tuple[Any, ...]:
        """Returns the arguments of model and guide; a sharded task's for all rows, since its guide has all of them."""
        everything = np.arange(self.task.rows(), dtype=np.int64)
        chosen = everything if rows is None or self.task.sharded else _rows(rows)
        return tuple(TaskRows(self.task).read(chosen))

    def _of_rows(self, value: Tensor, site: Mapping[str, Any], rows: ArrayLike | None) -> Tensor:
        """Returns samples of a site of a sharded task for the rows alone."""
        if rows is None or not self.task.sharded:
            return value
        event_dim = site["fn"].event_dim
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.size == self.task.rows():
                value = value.index_select(frame.dim - event_dim, torch.from_numpy(_rows(rows)))
        return value


def _has_checkpoints(run_dir: Path) -> bool:
    """Returns whether a folder is a run's; what lies at a URL is found out when it is read."""
    folder = checkpoints_of(run_dir)
    return isinstance(folder, str) or folder.is_dir()


def _choose(run_dir: Path, checkpoint: str | int) -> tuple[Storage, Candidate]:
    """Returns the checkpoint to read."""
    storage, candidates = choose(open_storage(checkpoints_of(run_dir)), "auto")
    readable = [each for each in candidates if each.manifest is not None]
    if checkpoint == "newest":
        chosen = readable
    else:
        step = _best_step(readable) if checkpoint == "best" else checkpoint
        chosen = [each for each in readable if each.step == step]
    if not chosen:
        there = ", ".join(str(each.step) for each in reversed(readable)) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint {checkpoint}; there are those of steps {there}")
    return storage, chosen[0]


def _best_step(newest_first: Sequence[Candidate]) -> int | None:
    for each in newest_first:
        progress = each.manifest.progress if each.manifest else None
        if isinstance(progress, dict) and "keep_best" in progress:
            return int(progress["keep_best"]["step"])
    return None


def _read(storage: Storage, candidate: Candidate, backend: Single) -> tuple[Loaded | None, str]:
    """Reads a checkpoint, or a newer one if the run has deleted it in the meantime."""
    problem = ""
    for _ in range(_NUM_TRIES):
        assert candidate.manifest is not None
        loaded, problem = read_on_all_ranks(
            storage, candidate.folder, candidate.manifest.attempt, backend, ShardedReader(backend)
        )
        if loaded is not None or candidate.folder in storage.folders():
            return loaded, problem
        candidate = next(each for each in choose(storage, "auto")[1] if each.manifest is not None)
    return None, problem


def _config_of(manifest: Manifest, run_dir: Path) -> RunConfig:
    if not isinstance(manifest.config, dict):
        raise CheckpointError(f"{run_dir}: its checkpoint has no configuration; load_run needs a run of a YAML")
    return RunConfig.model_validate(manifest.config)


def _rows(rows: ArrayLike) -> NDArray[np.int64]:
    return np.asarray(rows, dtype=np.int64).reshape(-1)


def _is_helper(site: Mapping[str, Any]) -> bool:
    """Returns whether a site is no latent variable of the user: the choice of a subsample."""
    return site["is_observed"] or type(site["fn"]).__name__ == "_Subsample"


def _one_chain(samples: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: value.numpy()[None] for name, value in samples.items()}

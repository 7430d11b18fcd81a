"""What a configuration trains: a model, its guide, and the rows that they read."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.config.plugins import load_reference
from distopt.infer import TensorRows
from distopt.reduce.errors import PeerError

if TYPE_CHECKING:
    from distopt.train.report import Report
    from distopt.train.validation import Measured


class TaskError(ValueError):
    """A task that cannot be built, lacks a member, or disagrees with the configuration."""


class PeerTaskError(TaskError, PeerError):
    """A task that another rank cannot build."""


class Task(ABC):
    """A class with these members is what `task:` in a configuration names; `task_args` are its constructor's arguments.

    It is built on every rank and must come out the same on all of them. In the model, the plate over rows has the size
    `rows()` whatever the batch, as in `pyro.plate("rows", self.rows(), subsample=torch.arange(len(y)))`: then the mean
    over the ranks of their losses is the loss of all rows that the step reads.

    A class that has the members without being a subclass works too.

    Attributes:
        model: The model, called with the arguments that `batch` returns.
        guide: The guide, called with the same; Any, so that a subclass can use the methods of its autoguide.
        sharded: Whether a row is a datapoint of a sharded plate, with latent variables that only the rank that holds it
            knows. Each rank then gets the same rows at every step, all that it holds; `data.global_batch` must be null.
    """

    sharded: bool = False
    model: Callable[..., Any]
    guide: Any

    @abstractmethod
    def rows(self) -> int:
        """Returns the number of rows of the training set, the same on all ranks."""

    @abstractmethod
    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of model and guide for some rows.

        With `data.prefetch` a thread calls it, several steps ahead: then it must not use the global random generators.

        Args:
            rows: (rows of this rank and step,) int64, each in [0, `rows()`).
        """

    def report(self, report: Report) -> None:  # noqa: B027  # optional
        """Adds the results to the report; called on rank 0 when the run is done.

        Without it, the report has a table and a plot of the parameters.
        """

    def validate(self) -> Mapping[str, Measured]:
        """Returns this rank's part of each metric on data that the run does not train on; called on all ranks.

        It runs every `train.validate_every_steps` steps, without gradients. A rank measures its share of the rows,
        `shard_rows(num_rows, rank, world_size)` of `distopt.data` with rank and world size of
        `distopt.backends.current()`, and returns `Mean(total, count)` for a mean over rows, or `Total(value)` for a
        sum. A plain number is averaged over the ranks.

        Example:
            >>> def validate(self):
            ...     worker = distopt.backends.current()
            ...     rows = distopt.data.shard_rows(len(self.y_test), worker.rank, worker.world_size)
            ...     errors = self.predict(self.x_test[rows]) - self.y_test[rows]
            ...     return {"mse": Mean(float(errors.square().sum()), len(rows))}
        """
        return {}

    def metrics(self) -> Mapping[str, float]:
        """Returns further numbers to log, of the parameters for example; called on rank 0 whenever the run logs."""
        return {}

    def columns(self) -> tuple[Tensor, ...] | None:
        """Returns what `batch` selects rows of, (rows(), ...) each; None if `batch` does anything else.

        If `batch(rows)` is `tuple(column[rows] for column in columns)`, a captured step selects the rows itself, in its
        first operations, and `batch` is not called for it. A subclass with a `batch` of its own, and without `columns`,
        has none.
        """
        return None

    def collect(self) -> None:  # noqa: B027  # optional
        """Collects what is distributed over the ranks, for `report`; called on all ranks when the run is done."""


_REQUIRED = ("model", "guide", "rows", "batch")


# Tasks need not inherit from `Task`: a class written before it existed, or one that must not import distopt, has the
# required members only. It is adapted in this one place, so that everywhere else all members can be relied on and none
# is looked up by name.
class _AdaptedTask(Task):
    """A task that is no subclass of `Task`, with the defaults of the optional members that it lacks."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.model = task.model
        self.guide = task.guide
        self.sharded = getattr(task, "sharded", Task.sharded)

    def __getattr__(self, name: str) -> Any:
        # What `load_run` returns as the task has all that the user's class has.
        if name == "_task":  # not there yet, as while it is copied
            raise AttributeError(name)
        return getattr(self._task, name)

    def rows(self) -> int:
        return int(self._task.rows())

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        batch: tuple[Tensor, ...] = self._task.batch(rows)
        return batch

    def report(self, report: Report) -> None:
        getattr(self._task, "report", super().report)(report)

    def validate(self) -> Mapping[str, Measured]:
        measured: Mapping[str, Measured] = getattr(self._task, "validate", super().validate)()
        return measured

    def metrics(self) -> Mapping[str, float]:
        metrics: Mapping[str, float] = getattr(self._task, "metrics", super().metrics)()
        return metrics

    def columns(self) -> tuple[Tensor, ...] | None:
        columns: tuple[Tensor, ...] | None = getattr(self._task, "columns", super().columns)()
        return columns

    def collect(self) -> None:
        getattr(self._task, "collect", super().collect)()


def load_task(reference: str, arguments: Mapping[str, Any]) -> Task:
    """Imports the class that `module:Name` stands for and calls it with `arguments`.

    Raises:
        ConfigError: The module cannot be imported, or has no such class.
        TaskError: The class does not accept the arguments, or lacks members of `Task`. What the constructor raises is
            not caught: it is a defect of the class and not of the configuration.
    """
    build = load_reference(reference, "task")
    # Bound before it is called: a TypeError of the call itself may as well come from inside of the constructor.
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise TaskError(f"task_args: {reference.partition(':')[2]}: {error}") from error

    if inspect.isabstract(build):
        missing = sorted(vars(build)["__abstractmethods__"])
    else:
        task = build(**arguments)
        missing = [member for member in _REQUIRED if not hasattr(task, member)]
    if missing:
        raise TaskError(f"task: {reference} lacks {', '.join(missing)}; see distopt.train.Task for what a task needs")
    return task if isinstance(task, Task) else _AdaptedTask(task)


class TaskRows:
    """The rows of a task as a source for `distopt.data.Loader`.

    Args:
        task: The task.
        device: Where tensors are moved; None leaves them where the task has them, as a loader that moves them wants.
    """

    def __init__(self, task: Task, device: torch.device | None = None) -> None:
        self._task = task
        self._device = device
        self._columns = _checked_columns(task)

    def __len__(self) -> int:
        return self._task.rows()

    def read(self, rows: NDArray[np.int64]) -> Sequence[Tensor]:
        """Returns the arguments of model and guide for these rows; rows of columns are selected when they are used.

        Raises:
            TaskError: The task returns something else than a tuple. A single tensor would be unpacked into its rows.
        """
        batch: Any
        if self._columns is not None:
            batch = TensorRows(self._columns, torch.from_numpy(rows))
            return batch if self._device is None else self._moved(batch)
        batch = self._task.batch(rows)
        if not isinstance(batch, tuple | list):
            raise TaskError(
                f"task: batch() returned a {type(batch).__name__}, expected a tuple of the arguments of model and "
                "guide; for a single argument: `return (x,)`"
            )
        return self._moved(batch)

    def _moved(self, batch: Iterable[Any]) -> tuple[Any, ...]:
        if self._device is None:
            return tuple(batch)
        return tuple(each.to(self._device) if isinstance(each, Tensor) else each for each in batch)


def _checked_columns(task: Task) -> tuple[Tensor, ...] | None:
    # A subclass that has a batch() of its own does not select from the columns of the class above it.
    owner = task._task if isinstance(task, _AdaptedTask) else task
    if _depth(owner, "batch") < _depth(owner, "columns"):
        return None
    columns = task.columns()
    if columns is None:
        return None
    lengths = [len(column) for column in columns]
    if set(lengths) != {task.rows()}:
        raise TaskError(f"task: columns() have {lengths} rows, expected {task.rows():,} in each, as rows() says")
    return tuple(columns)


def _depth(task: Any, member: str) -> int:
    """Returns how far above the object a member is defined: 0 for the object itself, 1 for its class."""
    if member in vars(task):
        return 0
    return next(
        (i for i, each in enumerate(type(task).__mro__, start=1) if member in vars(each)), len(type(task).__mro__) + 1
    )

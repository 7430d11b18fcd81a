"""What a YAML config trains: a model, its guide, and the rows it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distopt.config.plugins import load_reference

if TYPE_CHECKING:
    from distopt.train.report import Report


@runtime_checkable
class Task(Protocol):
    """A class with these members is what `task:` in a config names; `task_args` are its constructor's arguments.

    It is built on every rank and must come out the same on all of them. In the model, the plate over rows has the size
    `rows()` whatever the batch, as in `pyro.plate("rows", self.rows(), subsample=torch.arange(len(y)))`: then the
    ranks' mean loss is the loss of all their rows.

    A task whose rows are the datapoints of a sharded plate, with variables of their own, says `sharded = True`: each
    rank then gets the same rows at every step, all that it holds, and `data.global_batch` must be null. If it has a
    method `collect()`, that is called on every rank once the run is done, before the report: there it can `gather`.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]

    def rows(self) -> int:
        """Returns the number of rows of the training set."""

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of model and guide for these rows, (rows of this rank and step,) int64.

        With `data.prefetch` a thread calls it, steps ahead: then it must not draw from the global generators.
        """

    def report(self, report: Report) -> None:
        """Adds what was found to the report; called on rank 0 once the run is done."""


class TaskRows:
    """The rows of a task as a source for `distopt.data.Loader`."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __len__(self) -> int:
        return self._task.rows()

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of model and guide for these rows.

        Raises:
            TaskError: the task gives something else than a tuple; a lone tensor would be taken apart into its rows.
        """
        batch = self._task.batch(rows)
        if not isinstance(batch, tuple | list):
            raise TaskError(
                f"task: batch() returned a {type(batch).__name__}, expected a tuple of the arguments of model and "
                "guide; of a single one: `return (x,)`"
            )
        return tuple(batch)


class TaskError(ValueError):
    """A task that cannot be found or built, or lacks a member."""


def load_task(path: str, arguments: Mapping[str, Any]) -> Task:
    """Imports `module:Name` and calls it with `arguments`.

    Raises:
        ConfigError: The module cannot be imported, or has no such name.
        TaskError: It refuses the arguments, or lacks members of `Task`.
    """
    build = load_reference(path, "task")
    name = path.partition(":")[2]
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise TaskError(f"task_args: {name}: {error}") from error
    task = build(**arguments)  # what it raises itself is no mistake in the config
    missing = [member for member in ("model", "guide", "rows", "batch", "report") if not hasattr(task, member)]
    if missing:
        raise TaskError(f"task: {path} lacks {', '.join(missing)}; see distopt.train.Task for what a task must have")
    found: Task = task
    return found

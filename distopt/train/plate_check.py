"""Whether a task's model scales the rows of a step to all rows, as `Task` asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine

from distopt.infer.device import OnDevice
from distopt.optim.distributed.svi_step import preserving_buffers
from distopt.reduce.model_survey import ModelSurvey
from distopt.train.task import Task, TaskError, TaskRows


def check_plates(task: Task, rows: NDArray[np.int64], num_rows: int, *, device: torch.device | None = None) -> None:
    """Refuses a model whose plate over rows has the size of the batch: it counts the likelihood too little.

    The model is run on two numbers of rows. What changes its size with them, and is not scaled, follows the batch.
    Buffers of its modules are as before.

    Args:
        task: The task, whose parameters exist.
        rows: Some rows of a step.
        num_rows: Number of rows of the training set.
        device: Where the rows are moved and the model makes its tensors; None leaves both to the task.

    Raises:
        TaskError: Names the plate, and the line to write.
    """
    rows = rows[: num_rows - 1]
    if len(rows) < 2:
        return
    source = TaskRows(task, device)
    model = task.model if device is None else OnDevice(device)(task.model)
    larger = _survey(model, source.read(rows))
    smaller = _survey(model, source.read(rows[: len(rows) - 1]))
    for site, plate, size in larger.sites_sized_by_batch(smaller):
        raise TaskError(
            f"task: plate {plate!r}, with the observations {site!r}, has {size:,} datapoints for {len(rows):,} rows: "
            f"its size is that of the batch, so the likelihood of all {num_rows:,} rows is not counted in full. Write "
            f"pyro.plate({plate!r}, self.rows(), subsample_size=...) with the number of rows of the batch, such as "
            "subsample_size=len(x)."
        )


def _survey(model: Callable[..., Any], batch: Sequence[Any]) -> ModelSurvey:
    with preserving_buffers(), poutine.block(), ModelSurvey() as survey:
        model(*batch)
    return survey  # type: ignore[no-any-return]

"""A task whose plate has the size of the batch is refused; those that scale their rows are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from distopt.train.plate_check import check_plates
from distopt.train.task import Task, TaskError

NUM_ROWS = 950


class Rows(Task):
    """A task of 950 rows; `plate` says how its model states the plate over them."""

    def __init__(self, plate: str) -> None:
        self.plate = plate
        self.net = torch.nn.BatchNorm1d(1)
        self.guide = lambda *args: None

    def rows(self) -> int:
        return NUM_ROWS

    def batch(self, rows: Any) -> tuple[Tensor, ...]:
        return (torch.from_numpy(rows).float(),)

    def report(self, report: Any) -> None:
        """Has nothing to report."""

    def _plates(self, x: Tensor) -> Any:
        return {
            "batch": pyro.plate("rows", len(x)),
            "all rows": pyro.plate("rows", NUM_ROWS, subsample_size=len(x)),
            "indices": pyro.plate("rows", NUM_ROWS, subsample=torch.arange(len(x))),
            "by hand": pyro.plate("rows", len(x)),
        }[self.plate]

    def model(self, x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0)) + self.net(x[:, None])[:, 0]
        scale = NUM_ROWS / len(x) if self.plate == "by hand" else 1.0
        with pyro.plate("groups", 3):
            pyro.sample("group", dist.Normal(0.0, 1.0), obs=torch.ones(3))
        with pyro.poutine.scale(scale=scale), self._plates(x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_plate_of_the_batchs_size_is_refused_with_the_line_to_write() -> None:
    with pytest.raises(TaskError) as raised:
        check_plates(Rows("batch"), np.arange(10), NUM_ROWS)
    message = str(raised.value)
    assert message.startswith("task: plate 'rows', with the observations 'x', has 10 datapoints for 10 rows")
    assert "pyro.plate('rows', self.rows(), subsample_size=...)" in message


@pytest.mark.parametrize("plate", ["all rows", "indices", "by hand"])
def test_plates_that_count_all_rows_are_accepted_and_buffers_stay(plate: str) -> None:
    task = Rows(plate)
    check_plates(task, np.arange(NUM_ROWS), NUM_ROWS)
    assert task.net.running_mean is not None and task.net.running_mean.eq(0).all()
    assert not pyro.get_param_store()


def test_step_of_a_single_row_tells_nothing() -> None:
    check_plates(Rows("batch"), np.arange(1), NUM_ROWS)

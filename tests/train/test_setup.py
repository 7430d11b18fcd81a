"""What ranks check of each other before they train."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import yaml

from distopt.backends import current
from distopt.backends.single import Single
from distopt.cgroups import available_cores
from distopt.config import RunConfig, parse_config
from distopt.train import setup
from distopt.train.setup import (
    check_same_setup,
    count_rows,
    describe_setup,
    load_task_on_all_ranks,
    set_up_process,
)
from distopt.train.task import Task, TaskError
from tests import workers


class PickyTask(Task):
    """A task that rank `refuses` cannot build, and of which rank 1 has more rows."""

    def __init__(self, refuses: int = -1) -> None:
        if current().rank == refuses:
            raise TaskError(f"rank {refuses} has no data")
        self.model = self.guide = lambda *args: None

    def rows(self) -> int:
        return 10 + current().rank

    def batch(self, rows: Any) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(rows),)

    def report(self, report: Any) -> None:
        """Has nothing to report."""


def config(**keys: Any) -> RunConfig:
    return parse_config(yaml.safe_dump({"name": "x", "task": f"{__name__}:PickyTask"} | keys))


def _load(refuses: int) -> str:
    try:
        task = load_task_on_all_ranks(config(task_args={"refuses": refuses}), current())
        count_rows(task, current())
    except TaskError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        (1, "rank 1 has no data"),
        (-1, "task: rows() is 10 on rank 0 and 11 on rank 1; every rank must have the whole training set"),
    ],
)
def test_what_one_rank_finds_is_raised_on_all(refuses: int, message: str) -> None:
    first, second = workers.world("torch_dist", 2).run(_load, refuses)
    assert first == second and first.startswith(message)


def test_reference_to_nothing_is_an_error_before_the_first_step() -> None:
    with pytest.raises(TaskError, match=r"optim\.name: found .*:Nothing, but .* has no Nothing"):
        load_task_on_all_ranks(config(optim={"name": f"{__name__}:Nothing"}), Single())


def test_setup_holds_all_code_that_trains_and_leaves_out_what_may_differ() -> None:
    setup = describe_setup(config(train={"loss": f"{__name__}:PickyTask"}, log={"loggers": ["elsewhere:Logger"]}))
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert setup["code"][__name__] == digest
    assert "tests.train.tasks" in setup["code"], "all of the task's package, imported or not"
    assert not any("elsewhere" in key for key in setup["code"])
    assert setup["version"]["torch"] == torch.__version__
    assert not {"launch", "log", "run_dir", "serve"} & set(setup["config"])


def test_difference_between_ranks_is_shown_by_key_with_both_values() -> None:
    check_same_setup([{"a": {"b": 1}, "code": {}}] * 3)
    with pytest.raises(
        TaskError, match=r"different configuration, code or versions:\n  a\.b: 1 on rank 0, 2 on rank 2$"
    ):
        check_same_setup([{"a": {"b": value}, "code": {}} for value in (1, 1, 2)])


def test_process_starts_without_parameters_and_with_its_share_of_the_cores() -> None:
    num_threads = torch.get_num_threads()
    pyro.param("left", torch.zeros(1))
    try:
        set_up_process(config(), Single())
        assert torch.get_num_threads() == available_cores()
        for wanted, expected in (("3", 3), ("5,2", 5), ("many", available_cores())):
            set_up_process(config(launch={"env": {"OMP_NUM_THREADS": wanted}}), Single())
            assert torch.get_num_threads() == expected, "what the user says wins"
    finally:
        torch.set_num_threads(num_threads)
    assert not pyro.get_param_store()


@pytest.mark.parametrize(
    ("of_ranks", "limit", "expected"),
    [
        ([range(8)] * 2, None, 4),
        ([range(4), range(4, 8)], None, 4),  # each bound to a node of its own
        ([range(4), range(4), range(4, 8), range(4, 8)], None, 2),
        ([range(8), range(4)], None, 4),  # one bound, the other not: 4 cores and half of 4, but no more than its part
        ([range(4), range(4, 8)], 2, 1),  # docker run --cpus 2
    ],
)
def test_ranks_that_are_bound_share_cores_only_with_those_beside_them(of_ranks, limit, expected, monkeypatch) -> None:
    monkeypatch.setattr(setup, "limit_of_cores", lambda unlimited: min(unlimited, limit or unlimited))
    cpus = [set(each) for each in of_ranks]
    assert setup.share_of_cores(cpus[0], cpus) == expected


@pytest.mark.parametrize("rows", [0, "10", 2.5, None])
def test_number_of_rows_that_is_none_is_refused(rows: Any) -> None:
    task = PickyTask(refuses=-2)
    task.rows = lambda: rows  # type: ignore[method-assign]
    with pytest.raises(TaskError, match=r"task: rows\(\) returned \S+ on rank 0, expected the number of rows, an int"):
        count_rows(task, Single())


def test_number_of_rows_may_be_one_of_numpy() -> None:
    task = PickyTask(refuses=-2)
    task.rows = lambda: np.int64(7)  # type: ignore[method-assign]
    assert count_rows(task, Single()) == 7

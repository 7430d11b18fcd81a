"""A call that a rank has left out shows in the variables that count its loop."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch

from distopt.backends import current
from distopt.optim import SGD, DistributedOptimizer, ExponentialLR
from distopt.reduce import DisagreementError
from distopt.reduce.loop_counters import LoopCounters, explain_skipped
from tests.reduce.steps import step_with
from tests.workers import world


def skipped(numbers: list[int]) -> list[int]:
    counters = LoopCounters()
    counts = []
    for step in numbers:
        counts.append(counters.count_skipped())
        assert isinstance(step, int)
    return counts


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([0, 1, 2, 3, 4], [0, 0, 0, 0, 0]),
        ([0, 1, 2, 3, 5, 6, 9], [0, 0, 0, 0, 1, 0, 2]),
        ([10, 20, 30, 50, 60], [0, 0, 0, 1, 0]),
        ([0, 1, 2, 0, 1, 2, 0, 1, 2], [0] * 9),  # epochs
        ([3, 4, 9, 11, 30, 31], [0] * 6),  # no counter
        (list(range(200)) + list(range(201, 300)), [0] * 200 + [1] + [0] * 98),
    ],
)
def test_jumps_are_counted_in_calls(numbers: list[int], expected: list[int]) -> None:
    assert skipped(numbers) == expected


def test_variable_that_goes_on_evenly_outweighs_one_that_jumps() -> None:
    counters, counts = LoopCounters(), []
    num_done = 0
    for attempt in range(30):
        if attempt in (7, 11, 12):
            continue
        counts.append(counters.count_skipped())
        num_done += 1
    assert counts == [0] * num_done


class Batch:
    """Something that a loop holds."""


def test_locals_are_not_kept_and_dictionaries_of_the_users_stay_whole() -> None:
    counters = LoopCounters()

    def call() -> bool:
        batch = Batch()
        reference = weakref.ref(batch)
        counters.count_skipped()
        del batch
        return reference() is None

    def keep(rate: int) -> dict[str, Any]:
        settings = locals()
        counters.count_skipped()
        return settings

    assert call()
    assert keep(3)["rate"] == 3


def test_difference_is_proof_only_where_the_ranks_were_equal_before() -> None:
    assert explain_skipped([{"step": [9, 10]}, {"step": [9, 11]}]) == (
        "the variable step was 9 on all of them in their last call and is now 10, 11"
    )
    assert explain_skipped([{"step": [8, 10]}, {"step": [9, 11]}]) is None
    assert explain_skipped([{"step": [9, 10]}, {"row": [9, 11]}]) is None
    assert explain_skipped([{}, {"step": [9, 10]}]) is None


def _run_skipping(num_steps: int) -> str:
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(num_steps):
        if current().rank == 1 and step == 10:
            continue
        try:
            step_with(optim, {"x": torch.ones(2)})
        except DisagreementError as error:
            return str(error)
    return "no error"


def _run_skipping_alike() -> str:
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    for step in range(30):
        if step % 7 == 6:
            continue
        step_with(optim, {"x": torch.ones(2)})
    mine = [1, 2, 3, 4, 6, 7] if current().rank else [3, 4, 5, 6, 7, 8]  # rows of each rank's own
    for row in mine:
        step_with(optim, {"x": torch.full((2,), float(row))})
    return f"{optim.reducer.step} steps"


def _run_uneven_epochs() -> str:
    arguments = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    optim = DistributedOptimizer(ExponentialLR(arguments))
    pyro.param("x", torch.zeros(2))
    for _ in range(3):
        for _ in range(5 - current().rank):
            try:
                step_with(optim, {"x": torch.ones(2)})
            except DisagreementError as error:
                return str(error)
        optim.step()
    return "no error"


@pytest.mark.parametrize(
    ("body", "args", "message"),
    [
        (
            _run_skipping,
            (20,),
            "a rank has left out a call of the optimizer: of rank 0, 1, the variable step in",
        ),
        (_run_uneven_epochs, (), "step 4: the learning-rate schedule has taken 0 on rank 0, 1 on rank 1"),
    ],
)
def test_rank_that_leaves_out_a_call_is_found_at_its_next(body: Callable[..., str], args: Any, message: str) -> None:
    for text in world("torch_dist", 2).run(body, *args):
        assert message in text, text


def test_calls_that_all_ranks_leave_out_and_loops_over_a_ranks_own_rows_are_fine() -> None:
    assert world("torch_dist", 2).run(_run_skipping_alike) == ["32 steps", "32 steps"]

from __future__ import annotations

import time

import torch

from distopt.backends import current
from distopt.backends.single import Single
from distopt.train.monitor import MEASURED_STEPS, WARM_UP_STEPS, PaceMeter, RankPace, describe_straggler
from tests import workers


def paces(*work_ms: float, num_steps: int = MEASURED_STEPS) -> list[RankPace]:
    return [RankPace(rank, f"host{rank}", ms / 1e3, 0.0, num_steps) for rank, ms in enumerate(work_ms)]


def test_straggler_is_the_slowest_against_the_median_of_the_others() -> None:
    assert describe_straggler(paces(10, 12, 50, 14)) == (
        "rank 2 on host2 is a straggler: its work for a step takes 50 ms, "
        "4.2 times the median of the other ranks (12 ms)"
    )
    assert describe_straggler(paces(10, 12, 14, 11)) is None
    assert describe_straggler(paces(10)) is describe_straggler([]) is None


def test_few_or_tiny_steps_tell_nothing_of_a_straggler() -> None:
    assert describe_straggler(paces(10, 50)) is not None
    assert describe_straggler(paces(10, 50, num_steps=MEASURED_STEPS - 1)) is None
    assert describe_straggler(paces(0.2, 1.1)) is None
    assert describe_straggler(paces(0.2, 1.3)) is not None


def test_lone_rank_waits_for_nobody() -> None:
    pace = PaceMeter(Single())
    with pace.step():
        pass
    assert pace.all_ranks() == []


def straggle() -> list[RankPace]:
    """Rank 1 sleeps in its steps, and rank 0 waits for it; those of the warm-up do not count, where it is rank 0."""
    backend = current()
    pace = PaceMeter(backend)
    for step in range(WARM_UP_STEPS + 3):
        with pace.step():
            if backend.rank == (1 if step >= WARM_UP_STEPS else 0):
                time.sleep(0.3)
            backend.all_reduce(torch.ones(3)).wait()
    return pace.all_ranks()


def test_what_a_rank_waits_for_the_others_is_no_part_of_its_own() -> None:
    first, second = workers.world("torch_dist", 2).run(straggle)
    assert first == second and [each.rank for each in first] == [0, 1]
    assert first[1].work_s > first[0].work_s and first[0].waiting_s > first[1].waiting_s
    assert first[1].work_s >= 0.3, "a sleep is no shorter than it says"

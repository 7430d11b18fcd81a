"""Optimizers over part of the ranks: each group averages alone, and a stranger is told so."""

from __future__ import annotations

from tests import workers
from tests.reduce import groups


def test_process_groups_of_torch_average_alone() -> None:
    workers.world("torch_dist", 4).run(groups.process_groups_average_alone, timeout_s=90)


def test_process_sets_of_horovod_average_alone() -> None:
    statuses, started = workers.run_script("horovod", 4, groups.process_sets_average_alone, timeout_s=120)
    assert statuses == [0], started.output()
    assert all(f"rank {rank} has averaged" in started.output() for rank in range(4))

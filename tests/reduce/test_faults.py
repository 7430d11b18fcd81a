"""Ranks that fail for real: the others name the culprit, its step and cause, and end within their timeout."""

from __future__ import annotations

import pytest

from tests import workers
from tests.reduce import faults

TIMEOUT_S = 4.0

# What strikes rank 1 at step 3 -> what rank 0 must say.
SAID = {
    "raises": "rank 1 failed first, at step 3 in phase 'model': ValueError: a bad row in the data",
    "is killed": "waiting for rank 1 (stopped or unreachable; last seen at step",
    "is stopped": "waiting for rank 1 (stopped or unreachable; last seen at step",
    "leaves out a step of its loop": (
        "the ranks are at different calls of the optimizer: rank 0: step 3 (gradient), rank 1: step 4 (gradient)"
    ),
    "leaves out a call": "rank 1 exited after step 5 while other ranks were still waiting for it",
    "exits": "rank 1 exited after step 3 while other ranks were still waiting for it",
}


@pytest.mark.parametrize("fault", SAID)
def test_fault_of_one_rank_is_named_by_the_other(fault: str) -> None:
    statuses, started = workers.run_script("torch_dist", 2, faults.train, fault, str(TIMEOUT_S), timeout_s=120)
    assert statuses[0] == 1, started.output()
    assert SAID[fault] in started.output(rank=0)
    assert "trained:" not in started.output(rank=0)
    if fault == "leaves out a step of its loop":
        assert statuses[1] == 1 and SAID[fault] in started.output(rank=1)
    if fault == "raises":
        assert statuses[1] == 1
        # The culprit's own traceback is in both outputs.
        assert all('raise ValueError("a bad row in the data")' in started.output(rank) for rank in (0, 1))


def test_failing_process_ends_with_the_status_of_its_exception_though_its_heartbeat_is_in_the_store() -> None:
    statuses, started = workers.run_script("torch_dist", 2, faults.raise_amid_heartbeats)
    assert statuses == [1, 1], started.output()
    assert "terminate called" not in started.output()


@pytest.mark.parametrize("kind", ["horovod", "mpi"])
@pytest.mark.parametrize("fault", ["raises", "is stopped"])
def test_fault_of_one_rank_is_named_under_every_launcher(kind: str, fault: str) -> None:
    statuses, started = workers.run_script(kind, 2, faults.train, fault, str(TIMEOUT_S), timeout_s=120)
    assert SAID[fault] in started.output()
    assert "trained:" not in started.output()
    assert statuses[0] != 0

"""The side channel: what one rank reports through the store, the others read; a dead store is no hang."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore

from distopt.backends import heartbeat, process_ends
from distopt.backends.heartbeat import Failure, Heartbeat, call_within, start_store


@pytest.fixture
def ranks() -> Iterator[Callable[[int], Heartbeat]]:
    """Starts the heartbeat of a rank in a world of three that shares one store."""
    store, started = HashStore(), []

    def start(rank: int) -> Heartbeat:
        started.append(Heartbeat(store, rank, 3))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_failure_of_one_rank_is_read_by_the_others_with_its_step_and_cause(ranks):
    failed, other = ranks(2), ranks(0)
    failed.step, failed.phase = 812, "model"
    failed.fail("ValueError: a bad row", "Traceback: ...", linger_s=0.0)
    failure = other.wait_for_failure(10.0)
    assert failure == Failure(2, 812, "model", "ValueError: a bad row", "Traceback: ...")
    assert str(failure) == "rank 2 failed first, at step 812 in phase 'model': ValueError: a bad row"
    assert failed.wait_for_failure(0.1) is None  # it is nobody else's failure to this rank


def test_of_two_failures_all_ranks_read_the_first(ranks):
    first, second, other = ranks(0), ranks(1), ranks(2)
    first.fail("ValueError: the cause", "", linger_s=0.0)
    second.fail("KeyError: a consequence", "", linger_s=0.0)
    for each in (second, other):
        failure = each.wait_for_failure(10.0)
        assert failure is not None and failure.error == "ValueError: the cause"


def test_failing_rank_stays_until_all_have_read_its_cause(ranks):
    failed, _, _ = ranks(0), ranks(1), ranks(2)
    started = time.monotonic()
    failed.fail("ValueError: no", "", linger_s=60.0)
    assert time.monotonic() - started < 30


def test_rank_that_exits_is_named_with_its_last_step_unless_it_has_failed(ranks):
    exited, other = ranks(1), ranks(0)
    exited.step = 10
    exited.exit()
    failure = other.wait_for_failure(10.0)
    assert failure is not None and failure.exited
    assert str(failure).startswith("rank 1 exited after step 10 while other ranks were still waiting for it.")


def test_missing_ranks_are_told_apart(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    alive, stopped, asking = ranks(0), ranks(1), ranks(2)
    asking.calls = alive.calls = stopped.calls = 5
    stopped.step, stopped.phase = 3, "reduce"
    stopped._publish_beat()
    stopped.close()
    assert asking.describe_missing() == "rank 1 (stopped or unreachable; last seen at step 3, phase 'reduce')"
    alive.calls, alive.step = 4, 2
    assert asking.describe_missing().startswith("rank 0 (alive, at step 2, phase 'init'), rank 1 (stopped")


def test_word_of_a_failure_is_waited_for_only_while_all_ranks_are_alive(ranks, monkeypatch):
    """A run stands still meanwhile, and from a rank that was killed nothing can come."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.2)
    stopped, asking, other = ranks(1), ranks(0), ranks(2)
    waited = []
    wait = asking._failed_or_ended

    def failed_or_ended(beats, timeout_s):
        waited.append(timeout_s)
        return wait(beats, min(timeout_s, 0.5))

    monkeypatch.setattr(asking, "_failed_or_ended", failed_or_ended)
    assert asking.failure_or_missing(60.0) == "no other rank: all are alive and have started this collective"
    assert max(waited) > 50.0

    waited.clear()
    stopped.close()
    expected = "rank 1 (stopped or unreachable; last seen at step 0, phase 'init')"
    assert asking.failure_or_missing(60.0) == expected
    assert max(waited) < 1.0

    other.fail("ValueError: no", "", linger_s=0.0)
    failure = asking.failure_or_missing(10.0)
    assert isinstance(failure, Failure) and failure.rank == 2

    monkeypatch.setattr(asking, "failure", None)
    monkeypatch.setattr(heartbeat, "call_within", lambda timeout_s, call: None)
    waited.clear()
    assert "rank 0, whose store does not answer" in asking.failure_or_missing(60.0)
    assert waited == []


def test_word_of_a_process_that_has_ended_is_not_waited_for(ranks, monkeypatch):
    """Its silence would take longer to be seen: a killed rank's run starts again that much sooner."""
    asking, other, killed = ranks(0), ranks(2), ranks(1)
    program = "from distopt.backends.process_ends import this_process as p; print(p(), flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    killed._process = child.stdout.readline().strip()
    killed.step, killed.phase = 7, "reduce"
    killed._publish_beat()
    assert killed._process and not process_ends.has_ended(killed._process)
    child.kill()  # not waited for: what nobody has asked for its exit status has ended all the same
    with child:
        monkeypatch.setattr(heartbeat, "SILENCE_BEATS", 1000.0)
        expected = "rank 1 (its process has ended; last seen at step 7, phase 'reduce')"
        assert asking.failure_or_missing(60.0) == expected
    assert process_ends.has_ended(killed._process)

    # A failure that it published before it ended is the cause.
    killed.fail("ValueError: a bad row", "", linger_s=0.0)
    assert str(asking.failure_or_missing(60.0)).endswith("ValueError: a bad row")
    assert not process_ends.has_ended(other._process)


def test_only_the_end_of_a_process_of_this_machine_is_seen():
    name = process_ends.this_process()
    namespace, pid, started_at = name.rsplit(maxsplit=2)
    assert not process_ends.has_ended(name)
    assert process_ends.has_ended(f"{namespace} {pid} {int(started_at) + 1}")  # its number was given again
    assert not process_ends.has_ended(f"another machine {pid} {int(started_at) + 1}")
    assert not process_ends.has_ended("")


def test_rank_that_never_came_and_a_world_where_all_are_there(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    asking, _ = ranks(0), ranks(1)
    assert asking.describe_missing() == "rank 2 (never seen)"
    ranks(2)
    assert asking.describe_missing() == "no other rank: all are alive and have started this collective"


def test_call_of_a_store_that_fails_or_hangs_is_none_in_time():
    def refused() -> str:
        raise RuntimeError("Connection reset by peer")

    release = threading.Event()
    assert call_within(10.0, lambda: "an answer") == "an answer"
    assert call_within(10.0, refused) is None
    try:
        assert call_within(0.05, release.wait) is None
        assert Heartbeat.is_stuck()
    finally:
        release.set()


def test_store_without_an_answer_names_rank_0(ranks, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    asking = ranks(1)
    monkeypatch.setattr(heartbeat, "call_within", lambda timeout_s, call: None)
    assert asking.describe_missing().startswith("rank 0, whose store does not answer")


def test_store_on_rank_0_listens_on_loopback_where_all_ranks_share_a_machine():
    replies: list[object] = []

    def gather(value):
        replies.append(value)
        return [value, value]

    store = start_store(0, gather)
    store.set("key", "value")
    assert store.get("key") == b"value"
    _, (address, port) = replies
    assert (address, store.port) == ("127.0.0.1", port)

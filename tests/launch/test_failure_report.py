"""Who is blamed for the end of a run, from what supervisors recorded and ranks printed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from distopt.launch import failure_report
from distopt.launch.worker import events
from distopt.worker_error import WorkerError
from tests.launch import order_task
from tests.launch.launching import write_config

HEADER = "--- 2026-01-01T00:00:00.000+00:00 rank 0 of 2, attempt 0\nTraceback (most recent call last):\n"


@pytest.fixture
def report(tmp_path):
    """Returns the report of ranks with these logs and ends."""
    (tmp_path / "logs").mkdir()

    def describe(logs: dict[int, str], happened: list[events.Event]) -> str:
        for rank, text in logs.items():
            (tmp_path / f"logs/rank-{rank}.log").write_text(text)
        return failure_report.describe_failure(tmp_path, happened, 1, 3.0, "launcher.log")

    return describe


def end(rank: int, time: float, status: int = 1, **more) -> events.End:
    return events.End(rank, 0, "host", 1, time, status, **more)


def test_culprit_is_put_before_ranks_that_lost_their_connection_earlier(report):
    logs = {0: f"{HEADER}Connection reset by peer\n", 1: f"{HEADER}ValueError: no\n"}
    text = report(logs, [end(0, 10.0), end(1, 11.0)])
    assert text.startswith("distopt: the run failed after 0:00:03 (exit status 1 of the launcher).\n")
    assert "rank 1 on host died first" in text
    assert "After it: rank 0 on host ended with exit status 1 (Connection reset by peer)" in text


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        ("PeerError: rank 1 of 2 failed at step 3: ValueError: no", "step 3: ValueError: no"),
        ("distopt: rank 0 of 2: rank 1 of 2 failed at step 3: ValueError: no", "step 3: ValueError: no"),
        (
            "BackendError: rank 1 failed first, at step 3 in phase 'model': ValueError: no. Rank 0 of 2 stops because "
            "of it.",
            "step 3 in phase 'model': ValueError: no",
        ),
    ],
    ids=["agreed in a step", "printed by the built-in loop", "published by the heartbeat"],
)
def test_rank_whose_error_the_others_report_is_blamed_though_it_ended_last(report, printed, error):
    log = f"{HEADER}{printed}\n--- traceback of rank 1\nTraceback (most recent call last):\nValueError: no\n"
    text = report(
        {0: log, 1: f"{HEADER}ValueError: no\nTrace Shapes:\n"}, [end(0, 10.0), end(1, 11.0, -15, stopped=True)]
    )
    assert f"  rank 1 on host died first: it failed at {error}\n" in text
    assert "Stopped because of this error: rank 0 on host." in text
    assert "rank-1.log ends with" in text and "waiting" not in text


def test_rank_that_prints_its_own_number_is_not_excused(report):
    logs = {0: f"{HEADER}distopt: rank 0 of 2 failed at step 3: ValueError: no\n", 1: f"{HEADER}Broken pipe\n"}
    text = report(logs, [end(0, 11.0), end(1, 10.0)])
    assert "rank 0 on host died first: it ended with exit status 1." in text
    assert "Stopped because" not in text


@pytest.mark.parametrize("leaving", [{"status": 0}, {"status": -15, "stopped": True}], ids=["ended", "still leaving"])
def test_rank_that_others_say_exited_is_blamed_though_the_launcher_ended_it(report, leaving):
    reason = "rank 1 exited after step 5 while other ranks were still waiting for it."
    others = [
        end(rank, 10.0 + rank, raised=asdict(WorkerError(f"BackendError: {reason} Rank {rank} stops.", "", 10.0, True)))
        for rank in (0, 2)
    ]
    text = report({}, [*others, end(1, 12.0, **leaving)])
    assert "  rank 1 on host died first: it exited after step 5 while other ranks were still waiting for it.\n" in text
    assert "After it: rank 0 on host" in text and "After it: rank 2 on host" in text
    assert "Only waiting" not in text


@pytest.mark.parametrize("recorded_at", [3.0, 5.5])
def test_rank_that_exited_is_blamed_whether_its_end_was_recorded_before_or_after_the_error_of_who_waited(
    recorded_at, report
):
    reason = (
        "BackendError: rank 1 of 2, step 2, phase 'reduce': torch_dist all_reduce of (46,) torch.float64 failed while "
        "waiting for rank 0, whose store does not answer. The library says: Connection closed by peer"
    )
    text = report({}, [end(0, recorded_at, 0), end(1, 6.0, 1, raised=raised(reason, 5.0, from_peer=True))])
    assert "rank 0 on host died first: it ended with exit status 0 while other ranks were still waiting" in text
    assert "Already finished successfully" not in text


def test_ranks_that_waited_finished_early_or_vanished_are_named_apart(report):
    happened = [
        events.Start(3, 0, "far", 1, 1.0),
        end(0, 10.0, -11),
        end(1, 5.0, 0),
        end(2, 11.0, -15, stopped=True),
    ]
    text = report({}, happened)
    assert "rank 0 on host died first: it died of SIGSEGV (Segmentation fault)." in text
    assert "Already finished successfully before that: rank 1 on host." in text
    assert "Only waiting, terminated by the launcher: rank 2 on host." in text
    assert "No exit status from rank 3 on far: its host or supervisor is gone." in text


def test_supervisor_that_was_killed_is_told_from_a_lost_host(report):
    happened = [
        events.Start(0, 0, "host", 1, 1.0),
        events.Start(1, 0, "host", 2, 1.0),
        end(0, 11.0, -15, stopped=True),
    ]
    lines = report({}, happened).splitlines()
    lost = "No exit status from rank 1 on host: its supervisor was killed, its host is there."
    assert lines[1] == f"  {lost} The others stopped because of that."
    assert "rank 0" not in lines[1]


def test_run_in_which_no_worker_failed_shows_the_launchers_own_log(report, tmp_path):
    (tmp_path / "logs/launcher.log").write_text("mpirun: no slots\n")
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000010/manifest.json").touch()
    assert report({}, []).splitlines()[1:] == [
        f"  {tmp_path}/logs/launcher.log ends with:",
        "    mpirun: no slots",
        "  Run the same command again to resume from the last checkpoint.",
    ]


def test_last_attempt_is_of_the_last_job_though_an_earlier_one_had_more_attempts():
    jobs = [(0, 1.0), (1, 2.0), (0, 3.0)]  # attempts and times: one restart, then the job was requeued
    seen = [
        kind(rank, attempt, "host", 1, time + later, status)
        for attempt, time in jobs
        for kind, later, status in ((events.Start, 0.0, None), (events.End, 0.5, 1))
        for rank in (0, 1)
    ]
    assert failure_report.last_attempt(seen) == seen[-4:]
    shrunk = [*seen, events.Start(0, 1, "host", 1, 4.0)]  # an elastic world continued with one rank
    assert failure_report.last_attempt(shrunk) == shrunk[-1:]
    assert failure_report.last_attempt([]) == []


def test_success_and_orderly_stops_need_an_end_of_every_worker():
    started = [events.Start(rank, 0, "host", 1, 1.0) for rank in (0, 1)]
    assert failure_report.all_succeeded([*started, end(0, 2.0, 0), end(1, 2.0, 0)])
    assert not failure_report.all_succeeded([*started, end(0, 2.0, 0)])
    assert not failure_report.all_succeeded([*started, end(0, 2.0, 0), end(1, 2.0, 1)])
    assert failure_report.all_stopped([*started, end(0, 2.0, 143), end(1, 2.0, -15)])
    assert not failure_report.all_stopped([*started, end(0, 2.0, 143)])
    assert not failure_report.all_stopped([*started, end(0, 2.0, 143), end(1, 2.0, -9)])


def test_rank_that_the_launcher_ended_with_those_that_stopped_as_asked_has_stopped_too():
    started = [events.Start(rank, 0, "host", 1, 1.0) for rank in (0, 1)]
    for status in (0, 143, -15):
        assert failure_report.all_stopped([*started, end(0, 2.0, status)], ends_together=True)
    assert not failure_report.all_stopped([*started, end(0, 2.0, 1)], ends_together=True)
    assert not failure_report.all_stopped([*started, end(0, 2.0, -11)], ends_together=True)
    assert not failure_report.all_stopped(started, ends_together=True)


def test_out_of_memory_is_named_as_such():
    assert "out of memory" in failure_report.describe_end(end(0, 0.0, -9, out_of_memory=True))
    assert "out of memory?" in failure_report.describe_end(end(0, 0.0, -9))


@pytest.mark.parametrize(
    ("permanent", "hint"),
    [
        (False, "  Run the same command again to resume from the last checkpoint."),
        (True, "  The error would come again: mend it first, then run the same command again to resume from the last "
               "checkpoint."),
    ],
)  # fmt: skip
def test_who_would_meet_the_same_error_again_is_told_to_mend_it_first(permanent, hint, report, tmp_path):
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000005/manifest.json").write_text("{}")
    ended = end(0, 10.0, raised=raised("TypeError: no lrr", 9.0, permanent=permanent))
    assert report({}, [ended]).splitlines()[-1] == hint


def test_death_by_a_signal_without_a_name_is_described(report):
    assert "died of signal 40 (Real-time signal" in report({}, [end(0, 10.0, -40)])


def raised(text: str, time: float, **more) -> dict[str, object]:
    return {"text": text, "location": "task.py:3 in batch", "time": time, **more}


# How a rank dies, and what its supervisor records of it: status, what the worker has recorded, and whether its log says
# so. Host and supervisor of a lost rank record nothing.
VALUE_ERROR = raised("ValueError: the culprit", 5.0)
DEATHS = {
    "raise": (1, VALUE_ERROR, "failed at task.py:3 in batch: ValueError: the culprit"),
    "out of memory in Python": (1, raised("MemoryError", 5.0), "failed at task.py:3 in batch: MemoryError"),
    "sys.exit(3)": (3, None, "ended with exit status 3"),
    "os._exit(7)": (7, None, "ended with exit status 7"),
    "exit 0 early": (0, None, "ended with exit status 0 while other ranks were still waiting for it"),
    "SIGKILL": (-9, None, "was killed (SIGKILL)"),
    "SIGSEGV": (-11, None, "died of SIGSEGV"),
    "lost host": (None, None, ""),
}
WAITING = {
    "recorded, ended first": (1, raised("BackendError: Connection closed by peer", 6.0, from_peer=True), "", False),
    "printed, ended first": (1, None, "RuntimeError: Connection closed by peer", False),
    "C++ alone": (1, None, "[W1126 06:27:41.9 TCPStore.cpp:125] recvValue failed: Connection reset by peer", False),
    "ended by the launcher": (-15, None, "", True),
}


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize("death", DEATHS)
def test_rank_that_died_is_named_and_not_those_that_waited_for_it(death, waiting, culprit, report):
    status, error, description = DEATHS[death]
    other_status, other_error, printed, stopped = WAITING[waiting]
    other = 1 - culprit
    happened: list[events.Event] = [events.Start(rank, 0, f"host{rank}", 1, 1.0) for rank in (0, 1)]
    # The one that raised stays until the others have read its error, and so ends after them.
    time = 9.0 if error else 5.5
    if status is not None:
        happened.append(events.End(culprit, 0, f"host{culprit}", 1, time, status, raised=error))
    happened.append(events.End(other, 0, f"host{other}", 1, 7.0, other_status, stopped, raised=other_error))

    warning = "lib.py:3: UserWarning: slow\n  warnings.warn(text)\n"
    text = report(
        {other: f"{HEADER if 'Error' in printed else ''}{printed}\n" if printed else "", culprit: warning}, happened
    )
    cause = text.splitlines()[1]
    if status is None and not stopped:
        assert cause.startswith(f"  No exit status from rank {culprit} on host{culprit}: its host"), text
    elif status is not None and not (status == 0 and stopped):
        assert cause.startswith(f"  rank {culprit} on host{culprit} died first: it {description}"), text
    assert "TCPStore" not in cause and "Warning" not in cause and "warnings.warn" not in cause


@pytest.mark.parametrize("tells", ["itself", "another"])
def test_rank_that_failed_is_named_though_its_supervisor_was_killed_before_it_recorded_the_end(tells, report, tmp_path):
    happened = [
        events.Start(1, 0, "host", 17, 1.0),
        end(0, 10.0, 1, raised=raised("PeerError: x", 9.0, from_peer=True)),
    ]
    if tells == "itself":
        (tmp_path / "logs/.error-1-17.json").write_text(json.dumps(raised("ValueError: no", 8.0)))
        logs = {}
    else:
        logs = {0: f"{HEADER}PeerError: rank 1 of 2 failed at step 3: ValueError: no\n"}
    cause = report(logs, happened).splitlines()[1]
    assert re.match(r"  rank 1 on host died first: it failed at .*: ValueError: no", cause), cause


def test_rank_that_exited_is_named_though_mpirun_killed_supervisors_before_they_recorded_an_end(report):
    starts = [events.Start(rank, 0, "host", 17 + rank, 1.0) for rank in (0, 1)]
    text = report({}, [*starts, end(0, 5.0, 0)])
    assert "  rank 0 on host died first: it ended with exit status 0 while other ranks were still waiting" in text

    reason = "BackendError: rank 1 exited after step 2 while other ranks were still waiting for it. Rank 0 stops."
    text = report({}, [*starts, end(0, 5.0, 1, raised=raised(reason, 4.0, from_peer=True))])
    assert "  rank 1 on host died first: it exited after step 2 while other ranks were still waiting for it.\n" in text


FAILING = """
import os
from order_task import Order

class Failing(Order):
    def batch(self, rows):
        self.calls = getattr(self, "calls", 0) + 1
        if os.environ["RANK"] == "1" and self.calls == 4:
            raise ValueError("a bad row")
        return super().batch(rows)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_rank_that_raises_in_the_built_in_loop_is_blamed_with_its_step_and_error(start, tmp_path):
    shutil.copy(order_task.__file__, tmp_path)
    (tmp_path / "failing_task.py").write_text(FAILING)
    config = order_task.CONFIG.replace("order_task:Order", "failing_task:Failing")
    (tmp_path / "run.yaml").write_text(
        f"name: run\n{config}train: {{num_steps: 9}}\nlaunch: {{workers: 2, max_restarts: 0}}\n"
    )
    run = start()
    assert run.wait() == 1, run.everything()
    text = run.err[run.err.index("the run failed") :]
    assert re.search(r"rank 1 on \S+ died first: it failed at step \d+.*ValueError: a bad row", text), text
    assert "Stopped because of this error: rank 0 on" in text
    assert 'raise ValueError("a bad row")' in text.split("ends with:")[1]
    recorded = (Path(run.run_dir) / "logs/failure.txt").read_text()
    assert recorded.strip() in run.err
    assert json.loads((run.run_dir / "launch.json").read_text())["status"] == 1


@pytest.mark.timeout(180)
def test_rank_that_raises_in_a_users_script_is_blamed(start, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import distopt, torch\n"
        "backend = distopt.init()\n"
        "for step in range(9):\n"
        "    backend.note(step, 'model')\n"
        "    if backend.rank == 1 and step == 4: raise ValueError('a bad row')\n"
        "    backend.all_reduce(torch.zeros(1)).wait()\n"
    )
    write_config(tmp_path)
    run = start(f"script={script}")
    assert run.wait() == 1, run.everything()
    text = run.err[run.err.index("the run failed") :]
    assert re.search(r"rank 1 on \S+ died first: ", text), text
    assert "ValueError: a bad row" in text

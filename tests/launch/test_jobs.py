"""Runs below a `distopt launch`, as their directory tells of them."""

from __future__ import annotations

import fcntl
import json

import pytest

from distopt.launch.jobs import FollowedJob, Job, JobError, State, SubmittedJob, read_record

LAUNCH = {"pid": 17, "host": "elsewhere"}


def job_of(folder, **record) -> FollowedJob:
    (folder / "launch.json").write_text(json.dumps({**LAUNCH, **record}))
    return FollowedJob(folder)


@pytest.mark.parametrize(
    ("status", "phase"), [(0, "done"), (130, "stopped"), (143, "stopped"), (1, "failed"), (2, "failed")]
)
def test_state_of_a_run_that_ended_follows_from_its_exit_status(status, phase, tmp_path):
    assert job_of(tmp_path, status=status).state() == State(phase, f"exit status {status}")


def test_failed_run_names_who_died_first(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "failure.txt").write_text("distopt: the run failed\n  rank 1 on h died first: of x\n  more\n")
    assert job_of(tmp_path, status=1).state().detail == "exit status 1; rank 1 on h died first: of x"


def test_run_without_an_exit_status_is_running_while_the_lock_is_held_and_was_killed_otherwise(tmp_path):
    job = job_of(tmp_path)
    killed = State("failed", "`distopt launch`, process 17 on elsewhere, was killed")
    assert job.state() == killed
    with (tmp_path / "launch.lock").open("w") as lock:
        assert job.state() == killed
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert job.state() == State("running", "process 17 on elsewhere")
        with pytest.raises(JobError, match="`distopt launch` runs on elsewhere; run this command there"):
            job.stop()
    job.stop()  # of a run that has ended nothing is asked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no run was launched here"),
        ("{", "cannot be read"),
        ("[]x", "the next launch replaces it"),
        ("[1]", "found a list"),
    ],
)
def test_record_that_is_missing_or_damaged_is_an_error(text, message, tmp_path):
    if text is not None:
        (tmp_path / "launch.json").write_text(text)
    with pytest.raises(JobError, match=message):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("phase", "kept"),
    [("unknown", False), ("pending", True), ("running", True), ("stopped", False), ("done", False), ("failed", False)],
)
def test_by_default_a_name_is_kept_until_the_run_has_ended(phase, kept):
    class Minimal(SubmittedJob):
        def submit(self): ...
        def state(self): ...
        def logs(self, rank): ...
        def stop(self): ...

    assert Minimal().keeps_name(State(phase)) is kept
    assert (Minimal().kill(), Minimal.launcher_log) == (False, "")


@pytest.mark.parametrize("contract", [Job, SubmittedJob])
def test_job_that_lacks_a_member_cannot_be_made(contract):
    class Half(contract):
        def state(self): ...

    with pytest.raises(TypeError, match="abstract"):
        Half()

"""Starts runs, finds those that were started, and asks for their state, their output and their end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distopt.config import ConfigError, RunConfig, dump_yaml, load_config
from distopt.launchers import CONFIG_FILE, LAUNCH_FILE, LOGS

from . import failure_report, output, ssh
from .attach import SAVING, SCRIPT_STOPPING, run_plan, say
from .jobs import FollowedJob, Job, JobError, PlatformError, State, SubmittedJob
from .plan import Plan
from .platforms import Platform, load_platform
from .run_dir import RUNS, RunDirectoryError, claim, record, submission
from .worker.events import Reader
from .worker.processes import REQUESTS, heeded
from .worker.streams import best_effort

ERRORS = (JobError, ConfigError)
"""What asking for a run raises where there is none, or where its platform gives no answer."""

DETACHED_LOG = "detached.log"
START_TIMEOUT_S = 60
POLL_S = 1.0
PATIENCE_S = 300.0  # with a platform that does not answer
KILL_MARGIN_S = 20.0  # after the grace time


class LaunchRefused(RuntimeError):
    """The run was not started; the message says why."""


# Starting. The configuration has been checked. Either the platform has a job, which is submitted and, unless the user
# detaches, followed by asking for its state; or `distopt launch` starts the plan's commands and stays with them. To
# detach from the latter means to leave a second `distopt launch` behind, which does just that.


def start(config: RunConfig, platform: Platform, plan: Plan, *, detach: bool, ranks: Sequence[int] = (0,)) -> int:
    """Starts a run and shows what some ranks print.

    Args:
        config: The run, checked.
        platform: Its platform.
        plan: What that has rendered.
        detach: Whether to return as soon as it has been started.
        ranks: Whose output is shown.

    Returns:
        The run's exit status; 0 for one that has been started and left.

    Raises:
        LaunchRefused: Another process uses the run directory, or the platform refused the run.
    """
    directory = platform.record_dir(config)
    try:
        job = platform.job(config)
        if job is not None:
            return _submit(config, plan, job, directory, None if detach else ranks)
        if detach:
            return _detach(config, directory)
        with submission(plan, directory):
            return _run_here(config, plan, directory, ranks)
    except (RunDirectoryError, *ERRORS) as error:
        raise LaunchRefused(str(error)) from error


def _run_here(config: RunConfig, plan: Plan, directory: Path, ranks: Sequence[int]) -> int:
    # Only now, since it takes a file that has just been written to tell whether the hosts share the folder.
    if not_shared := ssh.check_folder(config, directory / LAUNCH_FILE):
        record(directory, plan, status=2)
        raise LaunchRefused("\n".join(map(str, not_shared)))

    with best_effort():
        workers = config.launch.world_sizes[-1]
        say(f"starting {workers} worker{'s' if workers > 1 else ''} ({plan.platform})")
        try:
            status = run_plan(plan, directory, config.launch.grace_s, ranks, stopping=_stopping(config))
        except JobError:
            record(directory, plan, status=2)
            raise
        try:
            record(directory, plan, status=status)
        except OSError as error:
            say(f"{directory / LAUNCH_FILE} cannot be written: {error.strerror}; exit status {status} is not recorded")
    return status


def _stopping(config: RunConfig) -> str:
    """Returns what workers do that are asked to stop: a script saves what it wants to."""
    return SAVING if config.script is None else SCRIPT_STOPPING


def _submit(config: RunConfig, plan: Plan, job: SubmittedJob, directory: Path, ranks: Sequence[int] | None) -> int:
    """Hands a run over; follows it where there are `ranks` to show."""
    _refuse_name_in_use(config, job, directory)
    read = output.of_job(job)
    lengths = [len(read(rank, 0)) for rank in ranks or ()]  # a job may append to the logs of an earlier one
    events = Reader(directory)

    with submission(plan, directory):
        reference = job.submit()
        record(directory, plan, reference=reference)
    say(f"submitted: {reference}")

    if ranks is None:
        say(_commands_for(directory))
        return 0
    with best_effort():
        shown = output.Output(ranks, read, lengths)
        return follow_submitted(job, directory, config.launch.grace_s, shown, events, stopping=_stopping(config))


def _refuse_name_in_use(config: RunConfig, job: SubmittedJob, directory: Path) -> None:
    """Refuses a run whose name the platform still keeps for an earlier one."""
    state = job.state()
    if job.keeps_name(state):
        known = ", ".join(filter(None, [state.phase, state.detail]))
        raise LaunchRefused(
            f"name: {config.launch.platform} already has a run {config.name} ({known}); "
            f"`distopt stop {shlex.quote(str(directory))}` ends it and frees its name (its checkpoints stay), "
            "or choose another name"
        )


def _detach(config: RunConfig, directory: Path) -> int:
    """Starts another `distopt launch` that stays with the run, and waits until it has the run directory."""
    claim(directory)
    source = directory / f".{CONFIG_FILE}.detached"
    source.write_text(dump_yaml(config), encoding="utf-8")
    before = _modified_ns(directory / LAUNCH_FILE)
    log_path = directory / LOGS / DETACHED_LOG
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "distopt.launch", "launch", "--", str(source)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    end = time.monotonic() + START_TIMEOUT_S
    while _modified_ns(directory / LAUNCH_FILE) == before and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if process.poll() not in (None, 0):
        raise LaunchRefused(log_path.read_text().strip().removeprefix(f"{source}: "))
    say(f"process {process.pid} follows the run; {_commands_for(directory)}")
    return 0


def _commands_for(directory: Path) -> str:
    run = shlex.quote(str(directory))
    return f"see `distopt status {run}` and `distopt logs {run}`; `distopt stop {run}` ends it"


def _modified_ns(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


# Finding runs that were started.


def find(run: str) -> Path:
    """Returns the directory of a run, which is named by that directory or by its name in runs/.

    Raises:
        JobError: There is none.
    """
    for directory in (Path(run), RUNS / run):
        if (directory / LAUNCH_FILE).exists():
            return directory

    known = ", ".join(path.name for path in all_runs()) or "none"
    hint = " A run is named by its directory or its name, not by its YAML." if run.endswith((".yaml", ".yml")) else ""
    raise JobError(f"{run}: no run was launched there (no {LAUNCH_FILE}). Known in {RUNS}: {known}.{hint}")


def all_runs() -> list[Path]:
    """Returns the directories in runs/ from which something was launched."""
    return sorted(path.parent for path in RUNS.glob(f"*/{LAUNCH_FILE}"))


def launched_config(directory: Path) -> RunConfig:
    """Returns the configuration with which a run was launched.

    Raises:
        ConfigError: It cannot be read.
    """
    return load_config(directory / CONFIG_FILE)


def job_of(directory: Path) -> Job:
    """Returns the run that was launched from a directory.

    Raises:
        ConfigError: Its configuration or its platform cannot be loaded.
    """
    config = launched_config(directory)
    return load_platform(config.launch.platform).job(config) or FollowedJob(directory)


# Asking for a run's output and its end.


def print_logs(job: Job, ranks: Sequence[int], *, until_end: bool) -> None:
    """Prints what some ranks have printed, once or until the run has ended."""
    shown = output.Output(ranks, output.of_job(job), headers=True)
    while True:
        # Asked before the output is read, so that nothing that is printed in between is missed.
        is_last = not until_end or job.state().ended
        shown.show()
        if is_last:
            return
        time.sleep(POLL_S)


def stop(directory: Path) -> State:
    """Stops a run and waits for its end; what is still there after the grace time is killed, where that can be done."""
    return stop_all([directory])[0]


def stop_all(directories: Sequence[Path]) -> list[State]:
    """Stops runs, all at once, and waits for their ends, as `stop` does.

    Raises:
        JobError: One cannot be stopped; the others have been.
    """
    jobs = [job_of(directory) for directory in directories]
    were_known = [job.state().phase != "unknown" for job in jobs]
    asked = []
    error: JobError | None = None
    for each in zip(jobs, directories, were_known, strict=True):
        try:
            each[0].stop()
            asked.append(each)
        except JobError as refused:
            error = error or refused

    states = [_wait_until_stopped(job, directory, was_known=was_known) for job, directory, was_known in asked]
    if error is not None:
        raise error
    return states


def _wait_until_stopped(job: Job, directory: Path, *, was_known: bool) -> State:
    state = _wait_for_end(job, launched_config(directory).launch.grace_s + KILL_MARGIN_S)
    # A platform may forget a run once it has ended; one that it never knew was not stopped.
    return State("stopped", state.detail) if was_known and state.phase == "unknown" else state


def _wait_for_end(job: Job, limit_s: float) -> State:
    end = time.monotonic() + limit_s
    while not (state := job.state()).ended and state.phase != "unknown":
        if time.monotonic() > end:
            if not job.kill():
                return state
            end = float("inf")
        time.sleep(POLL_S)
    return state


def follow_submitted(
    job: SubmittedJob, directory: Path, grace_s: float, shown: output.Output, events: Reader, *, stopping: str = SAVING
) -> int:
    """Shows a submitted run's states and its output until it ends; Ctrl-C, SIGTERM and a batch system's signal stop it.

    A terminal that hangs up leaves the run to its cluster.

    Args:
        job: The run.
        directory: Its record.
        grace_s: Seconds for the last checkpoint.
        shown: Prints the output of its ranks.
        events: Reads what its supervisors have recorded since it was submitted.
        stopping: What workers do that are asked to stop.

    Returns:
        0 when it is done, 128 and the signal's number (130 for Ctrl-C) when it was stopped by one, 1 otherwise.
    """
    received: list[int] = []
    numbers = heeded([number for number in REQUESTS if number != signal.SIGHUP])
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    last_line = ""
    last_answer = time.monotonic()

    def say_if_new(line: str) -> None:
        nonlocal last_line
        if line != last_line:
            say(line)
        last_line = line

    try:
        while True:
            try:
                state = job.state()
                say_if_new(f"{state.phase}: {state.detail}" if state.detail else state.phase)
                shown.show()
                last_answer = time.monotonic()
                if received:
                    say(f"received {signal.Signals(received[0]).name}: {stopping} (at most {grace_s:g} s)")
                    job.stop()
                    _wait_for_end(job, grace_s + KILL_MARGIN_S)
                    return 128 + received[0]
                if state.ended or state.phase == "unknown":
                    return _report(job, state, directory, events)
            except PlatformError as error:  # controllers and networks fail for a while, and the run continues
                say_if_new(f"no answer: {error}")
                if received or time.monotonic() - last_answer > PATIENCE_S:
                    say(f"the run may still be running: {_commands_for(directory)}")
                    return 1
            time.sleep(POLL_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _report(job: SubmittedJob, state: State, directory: Path, events: Reader) -> int:
    """Prints who died first, where supervisors have written that into the run directory; returns the exit status."""
    if state.phase == "done":
        return 0
    last_attempt = failure_report.last_attempt(events.new())
    if last_attempt:
        print(failure_report.describe_failure(directory, last_attempt, 1, 0.0, job.launcher_log), file=sys.stderr)
    return 1

"""From a checked configuration to a run that has been started and, unless it is left alone, has ended."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distopt.config import ConfigError, RunConfig, load_config
from distopt.launchers import CONFIG_FILE, LAUNCH_FILE, LOGS

from . import checks, failure_report, output, ssh
from .attach import follow, say
from .jobs import FollowedJob, Job, JobError, PlatformError, State, SubmittedJob
from .plan import Plan
from .platforms import load_platform
from .run_dir import RUNS, RunDirectoryError, claim, record, submission
from .worker.events import Reader

DETACHED_LOG = "launcher.log"
START_TIMEOUT_S = 60


class Refused(RuntimeError):
    """The run was not started; the message says why."""


def prepare(config: RunConfig) -> tuple[Plan | None, list[str], list[str]]:
    """Returns the plan, or the problems that keep the run from being started; and what may be wrong."""
    platform = load_platform(config.launch.platform)
    problems = checks.problems(config, platform)
    return None if problems else platform.plan(config), problems, checks.warnings(config, platform)


def ranks_of(config: RunConfig) -> range:
    """Returns the numbers by which the output of a run is asked for."""
    return load_platform(config.launch.platform).ranks(config)


def start(config: RunConfig, plan: Plan | None, *, detach: bool, ranks: Sequence[int] = (0,)) -> int:
    """Starts a prepared run, and shows what some ranks print.

    Returns:
        The run's exit status; 0 for a run that has been started and left.

    Raises:
        Refused: Another launcher is in the run directory, or the engine refused the run.
    """
    assert plan is not None
    platform = load_platform(config.launch.platform)
    directory = platform.record_dir(config)
    try:
        if (job := platform.job(config)) is not None:
            return _submit(config, plan, job, directory, None if detach else ranks)
        if detach:
            return _leave(config, directory)
        with submission(config, plan, directory):
            if unseen := ssh.blind(config, directory / LAUNCH_FILE):
                record(directory, plan, status=2)
                raise Refused("; ".join(unseen))
            status = follow(plan, directory, config.launch.grace_s, ranks)
            record(directory, plan, status=status)
        return status
    except (RunDirectoryError, *ERRORS) as error:
        raise Refused(str(error)) from error


def _submit(config: RunConfig, plan: Plan, job: SubmittedJob, directory: Path, ranks: Sequence[int] | None) -> int:
    _refuse_second(config, job, directory)
    read, followed = output.of_job(job), ranks or ()
    before = [len(read(rank, 0)) for rank in followed]  # a job may append to the logs of those before
    happened = Reader(directory)
    with submission(config, plan, directory):
        reference = job.submit()
        record(directory, plan, reference=reference)
    say(f"submitted: {reference}")
    if ranks is None:
        say(f"`distopt status {directory}`, `distopt logs {directory}` and `distopt stop {directory}` ask the engine")
        return 0
    return follow_submitted(job, directory, config.launch.grace_s, output.Output(ranks, read, before), happened)


def _refuse_second(config: RunConfig, job: SubmittedJob, directory: Path) -> None:
    """Refuses a run whose name the platform still keeps for an earlier one."""
    state = job.state()
    if not job.keeps_name(state):
        return
    known = state.phase + (f", {state.detail}" if state.detail else "")
    raise Refused(
        f"name: the engine has a run {config.name} already ({known}); `distopt stop {shlex.quote(str(directory))}` "
        "ends it and frees its name (its checkpoints stay), or choose another name"
    )


def _leave(config: RunConfig, directory: Path) -> int:
    """Starts a launcher of its own for the run, and waits until it has the run directory."""
    claim(directory)
    source = directory / f".{CONFIG_FILE}.detached"
    from distopt.config import dump_yaml

    source.write_text(dump_yaml(config))
    before = _modified(directory / LAUNCH_FILE)
    with (directory / LOGS / DETACHED_LOG).open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "distopt.launch", "launch", "--", str(source)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + START_TIMEOUT_S
    while _modified(directory / LAUNCH_FILE) == before and launcher.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if launcher.poll() not in (None, 0):
        said = (directory / LOGS / DETACHED_LOG).read_text().strip()
        raise Refused(said.removeprefix(f"{source}: "))
    say(f"process {launcher.pid} follows the run; `distopt status {directory}`, also `logs` and `stop`, ask about it")
    return 0


def _modified(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except FileNotFoundError:
        return 0


# How a run is, what it prints, and its end: asked of the engine that has it.


ERRORS = (JobError, ConfigError)
POLL_S = 1.0
PATIENCE_S = 300.0  # with an engine that gives no answer


def find(run: str) -> Path:
    """Returns the directory of a run that is named by it, or by its name in runs/.

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


def recorded(directory: Path) -> RunConfig:
    """Returns the configuration with which a run was launched."""
    return load_config(directory / CONFIG_FILE)


def job(directory: Path) -> Job:
    """Returns the run that was launched from a directory."""
    config = recorded(directory)
    return load_platform(config.launch.platform).job(config) or FollowedJob(directory)


def print_logs(job: Job, ranks: Sequence[int], *, follow: bool) -> None:
    """Prints what some ranks have printed, once or until the run has ended."""
    shown = output.Output(ranks, output.of_job(job), headers=True)
    while True:
        ended = not follow or job.state().ended
        shown.show()
        if ended:
            return
        time.sleep(POLL_S)


def stop(directory: Path) -> State:
    """Asks a run to end and waits for it; what is still there after the grace time is killed, where it can be."""
    run = job(directory)
    was_known = run.state().phase != "unknown"
    run.stop()
    state = _wait_for_end(run, recorded(directory).launch.grace_s + 20)
    # An engine may forget a run once it has ended; one that it never knew was not stopped.
    return State("stopped", state.detail) if was_known and state.phase == "unknown" else state


def _wait_for_end(run: Job, limit_s: float) -> State:
    end = time.monotonic() + limit_s
    while not (state := run.state()).ended and state.phase != "unknown":
        if time.monotonic() > end:
            if not run.kill():
                return state
            end = float("inf")
        time.sleep(POLL_S)
    return state


def follow_submitted(run: SubmittedJob, directory: Path, grace_s: float, shown: output.Output, happened: Reader) -> int:
    """Shows a submitted run's phases and its output until it ends; Ctrl-C and SIGTERM stop it.

    Args:
        run: The run.
        directory: Its record.
        grace_s: Seconds for the last checkpoint.
        shown: Prints what its ranks do.
        happened: Reads what its guards have written down since it was submitted.

    Returns:
        0 when it is done, 130 or 143 when it was stopped by a signal, 1 otherwise.
    """
    asked: list[int] = []
    before = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in _SIGNALS}
    said, last_answer = "", time.monotonic()
    try:
        while True:
            try:
                state = run.state()
                if said != (said := f"{state.phase}: {state.detail}" if state.detail else state.phase):
                    say(said)
                shown.show()
                last_answer = time.monotonic()
                if asked:
                    say(f"{signal.Signals(asked[0]).name}: a last checkpoint, then the end")
                    run.stop()
                    _wait_for_end(run, grace_s + 20)
                    return 128 + asked[0]
                if state.ended or state.phase == "unknown":
                    return _report(run, state, directory, happened)
            except PlatformError as error:  # controllers and networks have their moments
                if said != (said := f"no answer: {error}"):
                    say(said)
                if asked or time.monotonic() - last_answer > PATIENCE_S:
                    say(f"the run may go on: `distopt status {directory}` asks again")
                    return 1
            time.sleep(POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _report(run: SubmittedJob, state: State, directory: Path, happened: Reader) -> int:
    if state.phase == "done":
        return 0
    seen = failure_report.last_attempt(happened.new())
    if seen:
        print(failure_report.failure(directory, seen, 1, 0.0, run.launcher_log), file=sys.stderr)
    return 1

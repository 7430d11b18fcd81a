"""How a run is, what it prints, and its end: asked of the engine that has it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distopt.config import ConfigError, RunConfig, load_config

from . import output, report
from .batch import SlurmError
from .cluster import ClusterError
from .events import Reader
from .follow import say
from .jobs import FollowedJob, Job, JobError, State, SubmittedJob
from .plan_files import CONFIG_FILE, LAUNCH_FILE
from .platforms import platform
from .platforms.base import Platform
from .run_directory import RUNS

ERRORS = (JobError, SlurmError, ClusterError, ConfigError)
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


def submitted(chosen: Platform, config: RunConfig) -> SubmittedJob | None:
    """Returns the run on an engine that keeps it, or None where the launcher itself keeps it."""
    make = getattr(chosen, "job", None)
    found: SubmittedJob | None = make(config) if make is not None else None
    return found


def job(directory: Path) -> Job:
    """Returns the run that was launched from a directory."""
    config = recorded(directory)
    return submitted(platform(config.launch.platform), config) or FollowedJob(directory)


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
            kill = getattr(run, "kill", None)
            if kill is None:
                return state
            kill()
            end = float("inf")
        time.sleep(POLL_S)
    return state


def follow(run: SubmittedJob, directory: Path, grace_s: float, shown: output.Output, happened: Reader) -> int:
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
                    return _report(state, directory, happened)
            except (SlurmError, ClusterError) as error:  # controllers and networks have their moments
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


def _report(state: State, directory: Path, happened: Reader) -> int:
    if state.phase == "done":
        return 0
    seen = report.last_attempt(happened.new())
    if seen:
        print(report.failure(directory, seen, 1, 0.0, "slurm.log"), file=sys.stderr)
    return 1

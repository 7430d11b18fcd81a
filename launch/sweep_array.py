"""The trials of a grid as one job of a cluster, such as a job array of Slurm."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from distopt.config import RunConfig

from . import checks, failure_report, runs
from .attach import say
from .findings import failures
from .jobs import JobArray, JobError, PlatformError, State, read_record
from .platforms import Platform, load_platform, plan_of
from .run_dir import RunDirectoryError, record, submission
from .worker.events import Reader

POLL_S = 2.0  # one question for all trials


class TrialArray:
    """Submits trials as one job, and tells their states.

    Args:
        platform: Of all of them.
        array: What the platform makes of them.
        configs: The run of each trial, by number.
    """

    def __init__(self, platform: Platform, array: JobArray, configs: Mapping[int, RunConfig]) -> None:
        self._platform = platform
        self._array = array
        self._configs = configs
        self._unfinished: set[str] | None = None  # unknown while the platform does not answer
        self._asked_at = float("-inf")
        self._answered_at = time.monotonic()

    def submit(self, numbers: Sequence[int]) -> None:
        """Checks trials as `distopt launch` does, and submits them.

        Raises:
            JobError: One cannot be started, or a run directory is in use; nothing has been submitted.
        """
        for number in numbers:
            # The cluster is asked about the first one alone: all want the same of it.
            findings = checks.check(self._configs[number], self._platform, dry_run=number != numbers[0])
            if failed := failures(findings):
                raise JobError("\n".join(f"trial {number}: {finding}" for finding in failed))

        plans = {number: plan_of(self._platform, self._configs[number]) for number in numbers}
        try:
            with ExitStack() as held:
                for number in numbers:
                    held.enter_context(submission(plans[number], self._configs[number].run_dir))
                references = self._array.submit(numbers)
                for number, reference in references.items():
                    record(self._configs[number].run_dir, plans[number], reference=reference)
        except RunDirectoryError as error:
            raise JobError(str(error)) from error
        self._asked_at = float("-inf")
        say(f"submitted: {', '.join(references.values())}")

    def is_under_way(self, directory: Path) -> bool:
        """Returns whether a trial was submitted and need not be again, since it waits, runs or is done.

        Raises:
            PlatformError: The platform gives no answer. To submit the trial once more could start a second job in its
                run directory.
        """
        try:
            return runs.job_of(directory).state().phase in ("pending", "running", "done")
        except PlatformError:
            raise
        except runs.ERRORS:
            return False

    def state(self, directory: Path, followed: Sequence[Path]) -> State:
        """Returns the state of a trial.

        Args:
            directory: Its run directory.
            followed: Those of all trials that have not ended.

        Raises:
            PlatformError: The platform has not answered for minutes.
        """
        self._ask(followed)
        reference = _reference(directory)
        if reference is None or self._unfinished is None or reference in self._unfinished:
            return State("running")
        try:
            state = runs.job_of(directory).state()
        except PlatformError:  # it may be all that the platform does not answer now
            return State("running")
        if state.phase != "unknown":
            return state
        # A cluster forgets jobs some time after their end; their supervisors have recorded it.
        last_attempt = failure_report.last_attempt(Reader(directory, from_start=True).new())
        ended_well = last_attempt and failure_report.all_succeeded(last_attempt)
        return State("done" if ended_well else "failed", state.detail)

    def _ask(self, followed: Sequence[Path]) -> None:
        now = time.monotonic()
        if now - self._asked_at < POLL_S:
            return
        self._asked_at = now
        try:
            self._unfinished = self._array.unfinished(_references(followed))
            self._answered_at = now
        except PlatformError:  # controllers fail for a while, and the trials continue
            self._unfinished = None
            if now - self._answered_at > runs.PATIENCE_S:
                raise

    def stop(self, directories: Sequence[Path]) -> None:
        """Takes trials that wait out of the queue, and stops the others after a last checkpoint."""
        try:
            self._array.cancel_waiting(_references(directories))
        except PlatformError as error:
            say(str(error))
        try:
            runs.stop_all(directories)
        except runs.ERRORS as error:
            say(str(error))


def _reference(directory: Path) -> str | None:
    try:
        reference = read_record(directory).get("reference")
    except JobError:
        return None
    return None if reference is None else str(reference)


def _references(directories: Sequence[Path]) -> list[str]:
    return [reference for directory in directories if (reference := _reference(directory)) is not None]


def array_of_trials(name: str, prefix: str, configs: Mapping[int, RunConfig], parallel: int) -> TrialArray | None:
    """Returns the trials as one job; None where their platform has none, or where they are on different ones."""
    names = {config.launch.platform for config in configs.values()}
    if len(names) != 1:
        return None
    platform = load_platform(names.pop())
    array = platform.array(name, prefix, configs, parallel)
    return None if array is None else TrialArray(platform, array, configs)

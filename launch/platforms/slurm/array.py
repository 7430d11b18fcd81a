"""Runs of one sweep as one job array: each task is the batch script of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from distopt.config import RunConfig

from ...jobs import JobArray
from .job import BATCH_LOG, client
from .script import SCRIPT, options_of, quote_option

MAX_TASKS = 1000
"""MaxArraySize of a cluster that says nothing else is 1001, one above the highest number of a task."""

# Slurm gives each task its own value of these lines, or the array as a whole.
_OF_EACH = ("--job-name=", "--output=")


class SlurmArray(JobArray):
    """Runs that ask the cluster for the same, as one job.

    Args:
        name: What the cluster calls it.
        prefix: Run n has the directory `{prefix}{n:03d}`, below the current one.
        runs: The runs by number.
        parallel: How many tasks Slurm runs at once.
    """

    def __init__(self, name: str, prefix: str, runs: Mapping[int, RunConfig], parallel: int) -> None:
        self.name = name
        self.prefix = prefix
        self.parallel = parallel
        self._options = _common_options(next(iter(runs.values())))

    def submit(self, numbers: Iterable[int]) -> dict[int, str]:
        """Submits the array; a task is called ARRAY_NUMBER."""
        chosen = sorted(numbers)
        array = client(["sbatch", "--parsable"], stdin=self.script(chosen)).strip().partition(";")[0]
        return {number: f"{array}_{number}" for number in chosen}

    def script(self, numbers: Iterable[int]) -> str:
        """Returns the batch script of some runs, which in each task becomes the one of its run.

        Slurm replaces `%3a` in the path of the log by the number of the task.
        """
        options = [
            f"--job-name={self.name}",
            f"--array={','.join(map(str, numbers))}%{self.parallel}",
            f"--output={self.prefix.replace('%', '%%')}%3a/logs/{BATCH_LOG}",
            *self._options,
        ]
        lines = "\n".join(f"#SBATCH {quote_option(option)}" for option in options)
        path = f'"$(printf %s%03d/{SCRIPT} {shlex.quote(self.prefix)} "$SLURM_ARRAY_TASK_ID")"'
        return f"#!/bin/bash\n# distopt: sweep {self.name}\n{lines}\nexec bash {path}\n"

    def unfinished(self, references: Iterable[str]) -> set[str]:
        """Asks the controller once for all of them."""
        arrays = sorted({reference.partition("_")[0] for reference in references})
        # One that has been forgotten is not listed; squeue fails only if it is asked for a single one of those.
        listed = client(["squeue", "-h", "-r", "-o", "%i", "-j", ",".join(arrays)], accept="Invalid job id")
        return set(listed.split())

    def cancel_waiting(self, references: Iterable[str]) -> None:
        """Cancels tasks in the queue, so that none starts in the place of one that is stopped."""
        for array in sorted({reference.partition("_")[0] for reference in references}):
            client(["scancel", "--state=PENDING", array], accept="Invalid job id")


def make_array(name: str, prefix: str, runs: Mapping[int, RunConfig], parallel: int) -> SlurmArray | None:
    """Returns the runs as an array; None where tasks of one cannot be they: too many, or of different resources."""
    if len(runs) > MAX_TASKS:
        return None
    asked = [_common_options(config) for config in runs.values()]
    if not asked or any(options != asked[0] for options in asked):
        return None
    return SlurmArray(name, prefix, runs, parallel)


def _common_options(config: RunConfig) -> list[str]:
    return [option for option in options_of(config) if not option.startswith(_OF_EACH)]

"""Runs of one sweep as job arrays: each task is the batch script of a run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from distopt.config import RunConfig

from ...attach import say
from ...jobs import JobArray, PlatformError
from .job import BATCH_LOG, client
from .script import SCRIPT, common_options, quote_option

MAX_TASKS = 1000
"""Of a cluster that does not say how many tasks an array may have; the default of its MaxArraySize is 1001."""


class SlurmArray(JobArray):
    """Runs that ask the cluster for the same, as one job array, or as several where one may not have so many tasks.

    Run n is task `n % size` of an array. Slurm fills the number of a task into the path of its log, so `size` is a
    power of ten wherever there are several arrays: then the number of the run ends with that of its task.

    So that no more than `parallel` tasks run, each array waits for the end of an earlier one.

    Args:
        name: What the cluster calls it.
        prefix: Run n has the directory `{prefix}{n:03d}`, below the current one.
        runs: The runs by number.
        parallel: How many tasks Slurm runs at once.
        size: How many tasks an array has at most.
    """

    def __init__(self, name: str, prefix: str, runs: Mapping[int, RunConfig], parallel: int, size: int) -> None:
        self.name = name
        self.prefix = prefix
        self.size = size
        # Arrays that may run beside each other: one is too short for `parallel` tasks where that is more than its size.
        self._beside = min(-(-parallel // size), -(-(max(runs) + 1) // size))
        self._throttle = parallel // self._beside
        self._options = common_options(next(iter(runs.values())))

    def submit(self, numbers: Iterable[int]) -> dict[int, str]:
        """Submits the arrays; a task is called ARRAY_TASK."""
        arrays: list[str] = []
        references = {}
        try:
            for _, group in groupby(sorted(numbers), key=lambda number: number // self.size):
                chosen = list(group)
                after = arrays[-self._beside] if len(arrays) >= self._beside else None
                script = self.script(chosen, after)
                arrays.append(client(["sbatch", "--parsable"], stdin=script).strip().partition(";")[0])
                references.update({number: f"{arrays[-1]}_{number % self.size}" for number in chosen})
        except PlatformError as refusal:
            _withdraw(arrays, refusal)
            raise
        return references

    def script(self, numbers: Sequence[int], after: str | None = None) -> str:
        """Returns the batch script of one array, which in each task becomes the one of its run.

        Args:
            numbers: Of the runs, all with the same `number // size`.
            after: The array whose end it waits for.
        """
        first = numbers[0] - numbers[0] % self.size
        tasks = ",".join(str(number - first) for number in numbers)
        options = [
            f"--job-name={self.name}",
            f"--array={tasks}%{self._throttle}",
            f"--output={self.prefix.replace('%', '%%')}{self._digits(first)}/logs/{BATCH_LOG}",
            *self._options,
            # The last one counts: what the run itself waits for, the first array has waited for.
            *([] if after is None else [f"--dependency=afterany:{after}"]),
        ]
        lines = "\n".join(f"#SBATCH {quote_option(option)}" for option in options)
        number = f"$((SLURM_ARRAY_TASK_ID + {first}))" if first else "$SLURM_ARRAY_TASK_ID"
        path = f'"$(printf %s%03d/{SCRIPT} {shlex.quote(self.prefix)} "{number}")"'
        return f"#!/bin/bash\n# distopt: sweep {self.name}\n{lines}\nexec bash {path}\n"

    def _digits(self, first: int) -> str:
        """Returns the number of a run, of three digits or more, in which Slurm replaces `%2a` by a task's of two."""
        if first == 0:
            return "%3a"
        digits = len(str(self.size)) - 1
        return f"{first // self.size:0{max(3 - digits, 1)}d}%{digits}a"

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
    """Returns the runs as arrays; None where they ask for different resources, or the cluster takes no useful array."""
    asked = [common_options(config) for config in runs.values()]
    if not asked or any(options != asked[0] for options in asked):
        return None

    limit = max_tasks()
    num_tasks = max(runs) + 1
    size = num_tasks if num_tasks <= limit else 10 ** (len(str(limit)) - 1)
    # Of one task each, arrays would only be jobs that wait for each other.
    return None if size > limit or 1 == size < num_tasks else SlurmArray(name, prefix, runs, parallel, size)


def max_tasks() -> int:
    """Asks the cluster how many tasks an array may have; tasks are counted from 0. It is 0 where arrays are disabled.

    Says so where the cluster gives no answer, and returns `MAX_TASKS`.
    """
    try:
        settings = client(["scontrol", "show", "config"])
    except PlatformError as error:
        say(f"{error}. Job arrays of this sweep have at most {MAX_TASKS:,} tasks; the cluster may allow fewer")
        return MAX_TASKS
    limits = re.findall(r"^MaxArraySize\s*=\s*(\d+)|\bmax_array_tasks=(\d+)", settings, re.MULTILINE)
    return min((int(size or tasks) for size, tasks in limits), default=MAX_TASKS)


def _withdraw(arrays: Sequence[str], refusal: PlatformError) -> None:
    """Cancels arrays that were submitted before another one was refused."""
    for array in arrays:
        try:
            client(["scancel", array], accept="Invalid job id")
        except PlatformError as error:
            raise PlatformError(f"{refusal}; array {array} of this sweep is in the queue: {error}") from refusal

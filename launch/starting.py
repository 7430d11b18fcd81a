"""From a checked configuration to a run that has been started and, unless it is left alone, has ended."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distopt.config import RunConfig

from . import asking, checks, output, ssh
from .events import Reader
from .follow import follow, say
from .jobs import SubmittedJob, read_record
from .plan import Plan
from .plan_files import CONFIG_FILE, LAUNCH_FILE, LOGS
from .platforms import platform
from .run_directory import RunDirectoryError, claim, record, record_dir, submission

DETACHED_LOG = "launcher.log"
START_TIMEOUT_S = 60


class Refused(RuntimeError):
    """The run was not started; the message says why."""


def prepare(config: RunConfig) -> tuple[Plan | None, list[str]]:
    """Returns the plan, or the problems that keep the run from being started."""
    chosen = platform(config.launch.platform)
    problems = checks.problems(config, chosen)
    return (None, problems) if problems else (chosen.plan(config), [])


def start(config: RunConfig, plan: Plan | None, *, detach: bool, ranks: Sequence[int] = (0,)) -> int:
    """Starts a prepared run, and shows what some ranks print.

    Returns:
        The run's exit status; 0 for a run that has been started and left.

    Raises:
        Refused: Another launcher is in the run directory, or the engine refused the run.
    """
    assert plan is not None
    chosen = platform(config.launch.platform)
    directory = record_dir(config)
    try:
        if (job := asking.submitted(chosen, config)) is not None:
            return _submit(config, plan, job, None if detach else ranks)
        if detach:
            return _leave(config, directory)
        with submission(config, plan, directory):
            if unseen := ssh.blind(config, directory / LAUNCH_FILE):
                record(directory, plan, status=2)
                raise Refused("; ".join(unseen))
            status = follow(plan, directory, config.launch.grace_s, ranks)
            record(directory, plan, status=status)
        return status
    except (RunDirectoryError, *asking.ERRORS) as error:
        raise Refused(str(error)) from error


def _submit(config: RunConfig, plan: Plan, job: SubmittedJob, ranks: Sequence[int] | None) -> int:
    directory = record_dir(config)
    _refuse_second(config, job, directory)
    read, followed = output.of_job(job), ranks or ()
    # On Kubernetes a name belongs to one run; a Slurm job appends to the logs of those before.
    before = [len(read(rank, 0)) if config.launch.platform == "slurm" else 0 for rank in followed]
    happened = Reader(directory)
    with submission(config, plan, directory):
        reference = job.submit()
        record(directory, plan, reference=reference)
    say(f"submitted: {reference}")
    if ranks is None:
        say(f"`distopt status {directory}`, `distopt logs {directory}` and `distopt stop {directory}` ask the engine")
        return 0
    return asking.follow(job, directory, config.launch.grace_s, output.Output(ranks, read, before), happened)


def _refuse_second(config: RunConfig, job: SubmittedJob, directory: Path) -> None:
    """Refuses a run that its engine still has: two would write into one run directory."""
    on_slurm = config.launch.platform == "slurm"
    if on_slurm and not ((directory / LAUNCH_FILE).exists() and "reference" in read_record(directory)):
        return  # no job was submitted from there
    state = job.state()
    # A Slurm job that has ended takes no name; a Kubernetes object does until it is deleted.
    if state.phase == "unknown" or (on_slurm and state.ended):
        return
    known = state.phase + (f", {state.detail}" if state.detail else "")
    raise Refused(
        f"name: the engine has a run {config.name} already ({known}); `distopt stop {shlex.quote(str(directory))}` "
        f"{'ends' if on_slurm else 'ends and deletes'} it (its checkpoints stay), or choose another name"
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

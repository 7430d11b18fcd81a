"""A run on Slurm, through the commands of its client."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from distopt.launchers import STOP_FILE

from ...jobs import JobError, PlatformError, State, SubmittedJob, read_record
from ...worker.rank_log import read_log

TIMEOUT_S = 60
BATCH_LOG = "slurm.log"  # the batch script's output, beside the logs of the ranks

# What `squeue` and `sacct` call the states (squeue(1), "JOB STATE CODES"). Those in neither list are ends.
_PENDING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SUSPENDED",
    "RESIZING",
    "SPECIAL_EXIT",
}
_RUNNING = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT"}

_UNKNOWN_JOB = "Invalid job id"  # in the client's message


class SlurmJob(SubmittedJob):
    """One batch job.

    Args:
        run_dir: The run's folder, on a file system that all nodes share.
        submit_argv: The sbatch command that submits it.
    """

    launcher_log = BATCH_LOG

    def __init__(self, run_dir: Path, submit_argv: Sequence[str]) -> None:
        self.run_dir = run_dir
        self.submit_argv = list(submit_argv)

    def submit(self) -> str:
        """Submits the job and returns its number."""
        return client(self.submit_argv).strip().partition(";")[0]

    @property
    def number(self) -> str | None:
        """The number of the job that was submitted from the run directory; None where none was."""
        try:
            reference = read_record(self.run_dir).get("reference")
        except JobError:
            return None
        return None if reference is None else str(reference)

    def state(self) -> State:
        """Asks the controller, which forgets jobs minutes after their end, then the accounting, if there is one."""
        number = self.number
        if number is None:
            return State("unknown", f"{self.run_dir}: no job was submitted from here")

        job = client(["scontrol", "--oneliner", "show", "job", number], accept=_UNKNOWN_JOB)
        fields = dict(re.findall(r"(\w+)=(\S*)", job))
        state_code = fields.get("JobState", "")
        if not state_code and shutil.which("sacct"):
            accounted = client(["sacct", "-X", "-n", "-P", "-o", "State", "-j", number], accept="")
            state_code = next(iter(accounted.split()), "")  # `CANCELLED by 1000`
        return self._state(number, state_code, fields)

    def _state(self, number: str, state_code: str, fields: dict[str, str]) -> State:
        detail = f"job {number} {state_code}".strip()
        if fields.get("Restarts", "0") != "0":
            detail += f", requeued {fields['Restarts']} times"

        if not state_code:
            return State("unknown", f"Slurm does not know job {number} any more")
        if state_code in _PENDING:
            return State("pending", f"{detail} ({fields.get('Reason', '')})")
        if state_code in _RUNNING:
            return State("running", f"{detail} on {fields.get('NodeList', '')}")
        if state_code == "COMPLETED":
            return State("done", detail)
        # Workers that were asked to stop may end with any status; the stop file tells that they were.
        if state_code.startswith("CANCELLED") or (self.run_dir / STOP_FILE).exists():
            return State("stopped", detail)
        return State("failed", f"{detail}, exit status {fields.get('ExitCode', '?')} (status:signal)")

    def logs(self, rank: int) -> str:
        """Returns what a rank has printed so far."""
        return read_log(self.run_dir, rank).decode(errors="replace")

    def stop(self) -> None:
        """Asks the workers to save a checkpoint and end; a job that still waits is cancelled."""
        (self.run_dir / STOP_FILE).touch()
        if self.state().phase == "running":
            # Only the steps: a plain scancel kills after the cluster's KillWait, perhaps before the grace time is over.
            self._cancel("--signal=TERM")
        else:
            self._cancel()

    def kill(self) -> bool:
        """Cancels the job."""
        self._cancel(accept=_UNKNOWN_JOB)
        return True

    def _cancel(self, *options: str, accept: str | None = None) -> None:
        number = self.number
        if number is None:
            raise PlatformError(f"{self.run_dir}: no job was submitted from here")
        client(["scancel", *options, number], accept=accept)


def client(argv: Sequence[str], *, accept: str | None = None, stdin: str = "") -> str:
    """Returns the output of a command of Slurm's, empty where it fails with a message that has `accept` in it.

    Args:
        argv: The command.
        accept: A part of the message of a failure that is no error here; None accepts none.
        stdin: What it reads.

    Raises:
        PlatformError: It is not here, gave no answer or failed.
    """
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise PlatformError(f"there is no {argv[0]} on PATH; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise PlatformError(f"{argv[0]} gave no answer within {TIMEOUT_S} s; does `sinfo` work?") from None

    if done.returncode == 0:
        return done.stdout
    if accept is not None and accept in done.stderr:
        return ""
    raise PlatformError(f"{argv[0]}: {' '.join(done.stderr.split())[:300]}")

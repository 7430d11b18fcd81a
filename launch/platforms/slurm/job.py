"""A run on Slurm, through the commands of its client."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from distopt.launchers import LAUNCH_FILE, STOP_FILE

from ...jobs import PlatformError, State, SubmittedJob
from ...worker.rank_log import read_log

TIMEOUT_S = 60
BATCH_LOG = "slurm.log"  # the batch script's own output, beside the logs of the ranks
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


class SlurmJob(SubmittedJob):
    """One batch job.

    Args:
        run_dir: The run's folder, on a file system that all nodes share.
        submit_argv: The sbatch command that submits it.
        grace_s: Seconds for the last checkpoint.
    """

    launcher_log = BATCH_LOG

    def __init__(self, run_dir: Path, submit_argv: Sequence[str], grace_s: float) -> None:
        self.run_dir = run_dir
        self.submit_argv = list(submit_argv)
        self.grace_s = grace_s

    def submit(self) -> str:
        """Submits the job and returns its number."""
        return _client(self.submit_argv).strip().partition(";")[0]

    @property
    def number(self) -> str:
        """The job's number, as the run directory has it."""
        try:
            return str(json.loads((self.run_dir / LAUNCH_FILE).read_text())["reference"])
        except (OSError, ValueError, KeyError):
            raise PlatformError(f"{self.run_dir / LAUNCH_FILE}: no job was submitted from here") from None

    def state(self) -> State:
        """Asks the controller, which forgets jobs minutes after their end, then the accounting, if there is one."""
        try:
            number = self.number
        except PlatformError as error:
            return State("unknown", str(error))
        said = _client(["scontrol", "--oneliner", "show", "job", number], fine="Invalid job id")
        fields = dict(re.findall(r"(\w+)=(\S*)", said))
        word = fields.get("JobState", "")
        if not word:
            sacct = ["sacct", "-X", "-n", "-P", "-o", "State", "-j", number]
            accounted = _client(sacct, fine="") if shutil.which("sacct") else ""
            word = accounted.split()[0] if accounted.split() else ""
        return self._meaning(word, fields)

    def _meaning(self, word: str, fields: dict[str, str]) -> State:
        detail = f"job {self.number} {word}".strip()
        if fields.get("Restarts", "0") != "0":
            detail += f", requeued {fields['Restarts']} times"
        if word in _PENDING:
            return State("pending", f"{detail} ({fields.get('Reason', '')})")
        if word in _RUNNING:
            return State("running", f"{detail} on {fields.get('NodeList', '')}")
        if word == "COMPLETED":
            return State("done", detail)
        if word.startswith("CANCELLED") or (word and (self.run_dir / STOP_FILE).exists()):
            return State("stopped", detail)
        if not word:
            return State("unknown", f"Slurm remembers no job {self.number}")
        return State("failed", f"{detail}, exit status {fields.get('ExitCode', '?')} (status:signal)")

    def logs(self, rank: int) -> str:
        """Returns what a rank has printed so far."""
        return read_log(self.run_dir, rank).decode(errors="replace")

    def stop(self) -> None:
        """Has the workers save and end; a job that still waits is cancelled."""
        (self.run_dir / STOP_FILE).touch()
        if self.state().phase == "running":
            # To the steps alone: a plain scancel kills after the cluster's KillWait, perhaps before the grace time.
            _client(["scancel", "--signal=TERM", self.number])
        else:
            _client(["scancel", self.number])

    def kill(self) -> bool:
        """Ends what has not ended by itself."""
        _client(["scancel", self.number], fine="Invalid job id")
        return True


def _client(argv: Sequence[str], *, fine: str | None = None) -> str:
    """Returns what a command of Slurm's says; nothing where it fails with words that are `fine`."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise PlatformError(f"there is no {argv[0]} on PATH; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise PlatformError(f"{argv[0]} gave no answer within {TIMEOUT_S} s; does `sinfo` work?") from None
    if done.returncode and (fine is None or fine not in done.stderr):
        raise PlatformError(f"{argv[0]}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout if done.returncode == 0 else ""

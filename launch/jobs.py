"""Runs as their engines keep them: asked about, read and stopped in the same way on every platform."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from distopt.launchers import FAILURE_FILE, LAUNCH_FILE, LOCK_FILE, LOGS

from .worker.rank_log import read_log

Phase = Literal["unknown", "pending", "running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class State:
    """What an engine says about a run."""

    phase: Phase
    detail: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("stopped", "done", "failed")


class JobError(RuntimeError):
    """A run that cannot be asked or stopped from here; the message says from where."""


class PlatformError(JobError):
    """A platform refused something or did not answer; the message has its own text.

    Where a run is followed, a question that ends like this is asked again for some minutes.
    """


class Job(ABC):
    """A run that has been started."""

    @abstractmethod
    def state(self) -> State:
        """Asks the platform for the run's state.

        Raises:
            PlatformError: It gave no answer. A run that it does not know is no error; its phase is `unknown`.
        """

    @abstractmethod
    def logs(self, rank: int) -> str:
        """Returns what a rank has printed so far, empty where there is nothing yet.

        Args:
            rank: One of the platform's `ranks`.
        """

    @abstractmethod
    def stop(self) -> None:
        """Asks the platform to end the run, and returns at once; workers write a last checkpoint."""

    def kill(self) -> bool:
        """Ends what is still there after `stop` and the grace time.

        Returns:
            Whether it can: false, the default, is for a platform that kills by itself.
        """
        return False


class SubmittedJob(Job):
    """A run that a cluster keeps, whether `distopt launch` still follows it or not."""

    launcher_log: ClassVar[str] = ""
    """Name of the file in `run_dir/logs` with the output of the launcher on the cluster; empty where there is none."""

    @abstractmethod
    def submit(self) -> str:
        """Hands the run over, whole or not at all.

        Returns:
            What the platform calls the run, for the user; `distopt` records it in the run directory.

        Raises:
            PlatformError: The platform refuses it; nothing has been left there.
        """

    def keeps_name(self, state: State) -> bool:
        """Returns whether a run in this state keeps another one of its name from being submitted.

        By default only one that has not ended does: both would write into one run directory.
        """
        return state.phase != "unknown" and not state.ended


class FollowedJob(Job):
    """A run whose engine is a process below a launcher, which holds the run directory's lock as long as it lives."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def state(self) -> State:
        """Running while the lock is held; else what the launcher wrote at its end."""
        record = read_record(self.run_dir)
        where = f"process {record.get('pid')} on {record.get('host')}"
        if self._held():
            return State("running", where)
        status = record.get("status")
        if status is None:
            return State("failed", f"the launcher, {where}, was killed")
        phases: dict[int, Phase] = {0: "done", 130: "stopped", 143: "stopped"}
        return State(phases.get(status, "failed"), "; ".join([f"exit status {status}", *self._first_death()]))

    def _first_death(self) -> list[str]:
        """Returns the line of the launcher's report that says who died first."""
        try:
            return [line.strip() for line in (self.run_dir / LOGS / FAILURE_FILE).read_text().splitlines()[1:2]]
        except OSError:
            return []

    def _held(self) -> bool:
        try:
            with (self.run_dir / LOCK_FILE).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def logs(self, rank: int) -> str:
        """Returns a rank's log."""
        return read_log(self.run_dir, rank).decode(errors="replace")

    def stop(self) -> None:
        """Sends SIGTERM to the launcher, which stops its engine."""
        record = read_record(self.run_dir)
        if not self._held():
            return
        if record["host"] != socket.gethostname():
            raise JobError(f"the launcher runs on {record['host']}; give the command there")
        os.kill(record["pid"], signal.SIGTERM)


def read_record(run_dir: Path) -> dict[str, Any]:
    """Returns what was submitted from a run directory.

    Raises:
        JobError: Nothing was.
    """
    path = run_dir / LAUNCH_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise JobError(f"{run_dir}: no run was launched here (there is no {LAUNCH_FILE})") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: cannot be read ({error}); the next launch writes it anew") from None
    return record

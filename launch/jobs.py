"""Runs that were started: asked for their state, read and stopped in the same way on every platform."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from distopt.launchers import FAILURE_FILE, LAUNCH_FILE, LOCK_FILE, LOGS

from .worker.processes import REQUESTS
from .worker.rank_log import read_log

Phase = Literal["unknown", "pending", "running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class State:
    """The state of a run.

    Attributes:
        phase: `unknown` is a run that its platform has never had, or has forgotten.
        detail: What the platform says about it, for the user.
    """

    phase: Phase
    detail: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("stopped", "done", "failed")


class JobError(RuntimeError):
    """A run cannot be asked or stopped from here; the message says from where."""


class PlatformError(JobError):
    """A platform refused something or did not answer; the message has its explanation.

    While a run is followed, a question that fails like this is repeated for some minutes.
    """


class Job(ABC):
    """A run that has been started."""

    @abstractmethod
    def state(self) -> State:
        """Asks for the run's state.

        Raises:
            PlatformError: The platform gave no answer. A run that it does not know is no error but `unknown`.
        """

    @abstractmethod
    def logs(self, rank: int) -> str:
        """Returns all that a rank has printed, empty where there is nothing yet.

        Args:
            rank: One of the platform's `ranks`.
        """

    @abstractmethod
    def stop(self) -> None:
        """Asks for the run's end and returns at once; the workers save a checkpoint first."""

    def kill(self) -> bool:
        """Ends what is still there after `stop` and the grace time.

        Returns:
            Whether that is possible; false, the default, is for a platform that kills by itself.
        """
        return False


class SubmittedJob(Job):
    """A run that a cluster keeps, whether `distopt launch` still follows it or not."""

    launcher_log: ClassVar[str] = ""
    """Name of the file in `run_dir/logs` with the output of the launcher on the cluster; empty where there is none."""

    @abstractmethod
    def submit(self) -> str:
        """Hands the run over, as a whole or not at all.

        Returns:
            What the platform calls the run; it is shown to the user and kept in the run's record.

        Raises:
            PlatformError: The platform refuses the run; nothing of it is left there.
        """

    def keeps_name(self, state: State) -> bool:
        """Returns whether a run in this state keeps another one of its name from being submitted.

        By default only one that has not ended does, since both would write into one run directory.
        """
        return state.phase != "unknown" and not state.ended


class JobArray(ABC):
    """Runs of one sweep that a cluster takes as one job; each can be asked and stopped by its own `Job` as well."""

    @abstractmethod
    def submit(self, numbers: Iterable[int]) -> dict[int, str]:
        """Hands some runs over, all or none; their directories have been made.

        Returns:
            What the platform calls each run, by number; it is kept in the run's record.

        Raises:
            PlatformError: The platform refuses them; nothing of them is left there.
        """

    @abstractmethod
    def unfinished(self, references: Iterable[str]) -> set[str]:
        """Returns those of some runs that wait or run, in one question for all.

        Raises:
            PlatformError: The platform gave no answer.
        """

    @abstractmethod
    def cancel_waiting(self, references: Iterable[str]) -> None:
        """Takes those that have not started out of the queue.

        Raises:
            PlatformError: The platform gave no answer.
        """


class FollowedJob(Job):
    """A run below a `distopt launch`, which holds a lock in the run directory as long as it lives.

    The kernel releases the lock however that process ends, so a run cannot seem to be running after a kill -9.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def state(self) -> State:
        """Returns `running` while the lock is held, then what `distopt launch` recorded at its end."""
        record = read_record(self.run_dir)
        process = f"process {record.get('pid')} on {record.get('host')}"
        if self._is_locked():
            return State("running", process)

        # The record has a status only once the run has ended, and the lock is held until then.
        status = record.get("status")
        if status is None:
            return State("failed", f"`distopt launch`, {process}, was killed")
        phases: dict[int, Phase] = {0: "done", **{128 + number: "stopped" for number in REQUESTS}}
        return State(phases.get(status, "failed"), "; ".join([f"exit status {status}", *self._first_death()]))

    def _first_death(self) -> list[str]:
        """Returns the line of the failure report that tells who died first."""
        try:
            report = (self.run_dir / LOGS / FAILURE_FILE).read_text()
        except OSError:
            return []
        return [line.strip() for line in report.splitlines()[1:2]]

    def _is_locked(self) -> bool:
        # The only way to see a lock is to take it. It is released at once, and two who look at the same moment can at
        # worst both believe that the run is still running.
        try:
            with (self.run_dir / LOCK_FILE).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (FileNotFoundError, IsADirectoryError):
            pass
        return False

    def logs(self, rank: int) -> str:
        """Returns a rank's log."""
        return read_log(self.run_dir, rank).decode(errors="replace")

    def stop(self) -> None:
        """Sends SIGTERM to `distopt launch`, which stops the workers."""
        record = read_record(self.run_dir)
        if not self._is_locked():
            return
        if record["host"] != socket.gethostname():
            raise JobError(f"`distopt launch` runs on {record['host']}; run this command there")
        os.kill(record["pid"], signal.SIGTERM)


def read_record(run_dir: Path) -> dict[str, Any]:
    """Returns what was recorded when a run was launched from a directory.

    Raises:
        JobError: Nothing was.
    """
    path = run_dir / LAUNCH_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError(f"found a {type(record).__name__}, expected an object")
    except FileNotFoundError:
        raise JobError(f"{run_dir}: no run was launched here (there is no {LAUNCH_FILE})") from None
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: cannot be read ({error}); the next launch replaces it") from None
    return record

"""`distopt sweep`: trials as runs of the launcher, so many at once; a sweep that was killed continues.

Each trial is a `distopt launch` of its own, unless the trials are known beforehand and their cluster takes them as one
job (`sweep_array`).
"""

from __future__ import annotations

import fcntl
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distopt.config import ConfigError, RunConfig, load_config
from distopt.config.sweep_schema import SweepConfig, as_overrides
from distopt.launchers import LAUNCH_FILE
from distopt.run_files import read_metrics

from . import runs
from .attach import say
from .jobs import JobError, State
from .run_dir import RUNS, write
from .searches import Search, make_search
from .status import state_of
from .sweep_array import array_of_trials
from .worker.processes import heeded

RECORD = "sweep.json"
POLL_S = 0.5
MAY_DIFFER = ("parallel", "overrides", "num_trials")
"""Keys that may change when a sweep continues."""


@dataclass
class Trial:
    """One run of a sweep.

    Attributes:
        number: Counted from 0.
        values: What it changes, by dotted key.
        state: `running`, `stopped` (it continues with the sweep), `done`, `pruned` or `failed`.
        value: The last value of the metric, None before the first.
        step: At which step that was.
    """

    number: int
    values: dict[str, Any]
    state: str = "running"
    value: float | None = None
    step: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "pruned", "failed")

    def __str__(self) -> str:
        """Returns its number and values."""
        return f"trial {self.number} ({', '.join(as_overrides(self.values))})"


class Sweep:
    """The trials of a sweep, from the first or from where an earlier process left them.

    Args:
        config: The sweep, checked.

    Attributes:
        folder: Where it is recorded.
        trials: In the order of their numbers.

    Raises:
        ConfigError: The folder cannot be made.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self.folder = RUNS / config.name
        self.trials: list[Trial] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}  # of trials that this process has launched
        self._array = array_of_trials(config.name, f"{RUNS.resolve() / config.name}-", self._configs(), config.parallel)
        self._unsubmitted: list[int] = []  # trials that the array is to start
        self._received = 0
        self._has_all = False
        try:
            (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError([f"name: {self.folder} cannot be written to: {error.strerror}"]) from error

    def run(self) -> int:
        """Runs all trials; returns 0, 1 if one failed, or 128 and the number of the signal that stopped the sweep.

        Raises:
            ConfigError: The folder has a sweep with another search, or the search cannot be made; nothing has started.
            JobError: Another process runs this sweep.
        """
        with self._locked(), self._signals():
            self._read()
            self._refuse_other_runs()
            self._search = make_search(self.config, self.folder, len(self.trials))
            for trial in self.trials:
                if not trial.has_ended:
                    self._start(trial)
            while not self._received:
                self._fill()
                running = [trial for trial in self.trials if not trial.has_ended]
                if not running:
                    break
                for trial in running:
                    self._look_at(trial)
                time.sleep(POLL_S)
            if self._received:
                self._stop_all()
                say(f"stopped; run the same command again to continue ({self._count('done')} trials are done)")
                return 128 + self._received
        return 1 if self._count("failed") else 0

    def run_dir(self, trial: Trial) -> Path:
        """Returns the run directory of a trial."""
        return RUNS / f"{self.config.name}-{trial.number:03d}"

    def ranked(self) -> list[Trial]:
        """Returns the trials, the best first; those that are not done come last."""
        sign = 1 if self.config.mode == "min" else -1
        return sorted(self.trials, key=lambda each: (each.state != "done", sign * _or_worst(each.value, sign)))

    # The record.

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "sweep.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobError(f"{self.folder} is in use by another distopt sweep") from None
            yield

    def _read(self) -> None:
        path = self.folder / RECORD
        if not path.exists():
            return
        record = json.loads(path.read_text(encoding="utf-8"))
        before, now = (_compared(each) for each in (record["config"], self.config.as_json()))
        differing = [key for key in now if before.get(key) != now[key]]
        if differing:
            raise ConfigError(
                [f"{path} is of a sweep with another {', '.join(differing)}; choose another name, or move it away, and "
                 f"its runs {self.config.name}-*"]
            )  # fmt: skip
        self.trials = [Trial(**each) for each in record["trials"]]

    def _refuse_other_runs(self) -> None:
        """Refuses run directories of trials that were not recorded: what another run has reached is not theirs."""
        search = self.config.optuna
        num_trials = len(self.config.combinations()) if search is None else search.num_trials
        for number in range(len(self.trials), num_trials):
            directory = self.run_dir(Trial(number, {}))
            if (directory / LAUNCH_FILE).exists():
                raise ConfigError(
                    [f"{directory} is there, and {self.folder / RECORD} has no trial {number}: it is of another sweep; "
                     "choose another name, or move it away"]
                )  # fmt: skip

    def _write(self) -> None:
        trials = [asdict(each) for each in self.trials]
        write(self.folder / RECORD, json.dumps({"config": self.config.as_json(), "trials": trials}, indent=1) + "\n")

    def _count(self, state: str) -> int:
        return sum(trial.state == state for trial in self.trials)

    # The trials.

    def _fill(self) -> None:
        """Starts trials until so many run as may run at once, which an array sees to itself."""
        limit = math.inf if self._array is not None else self.config.parallel
        while not self._has_all and sum(not trial.has_ended for trial in self.trials) < limit:
            values = self._search.suggest(len(self.trials))
            if values is None:
                self._has_all = True
                break
            # Recorded before it starts: one that is found without a run is started then.
            self.trials.append(Trial(len(self.trials), values))
            self._write()
            self._start(self.trials[-1])

        if self._array is not None and self._unsubmitted:
            self._array.submit(self._unsubmitted)
            self._unsubmitted = []

    def _start(self, trial: Trial) -> None:
        """Launches a trial, or follows its run where that goes on; one that was stopped resumes."""
        directory = self.run_dir(trial)
        # One that has ended without the sweep having noted it was interrupted with it, and resumes.
        if (directory / LAUNCH_FILE).exists() and self._is_under_way(directory):
            say(f"{trial} is followed")
            return

        trial.state = "running"
        if self._array is not None:
            self._unsubmitted.append(trial.number)
            return
        with (self.folder / "logs" / f"{directory.name}.log").open("ab") as log:
            # In a session of its own: Ctrl-C stops the sweep, which then stops its trials.
            self._processes[trial.number] = subprocess.Popen(
                self._command(trial), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        say(f"{trial} started")

    def _is_under_way(self, directory: Path) -> bool:
        if self._array is not None:
            return self._array.is_under_way(directory)
        return state_of(directory).phase in ("pending", "running", "done")

    def _command(self, trial: Trial) -> list[str]:
        return [sys.executable, "-m", "distopt.launch", "launch", self.config.run, *self._overrides(trial)]

    def _overrides(self, trial: Trial) -> list[str]:
        directory = self.run_dir(trial)
        return [
            *self.config.overrides,
            *as_overrides(trial.values),
            f"name={directory.name}",
            f"run_dir={directory}",
        ]

    def _configs(self) -> dict[int, RunConfig]:
        """Returns the runs of a grid by the numbers of their trials; a search knows none before."""
        trials = [Trial(number, values) for number, values in enumerate(self.config.combinations())]
        return {trial.number: load_config(self.config.run, self._overrides(trial)) for trial in trials}

    def _look_at(self, trial: Trial) -> None:
        """Reads what a trial has logged since, and notes its end."""
        state = self._state(trial)
        is_pruned = self._read_metric(trial) and not state.ended
        if is_pruned:
            self._stop(trial)
            self._end(trial, "pruned")
        elif state.ended:
            self._end(trial, "done" if state.phase == "done" else "failed", state.detail)

    def _state(self, trial: Trial) -> State:
        if self._array is not None:
            return self._array.state(self.run_dir(trial), self._followed())
        process = self._processes.get(trial.number)
        if process is None:
            return state_of(self.run_dir(trial))
        status = process.poll()
        if status is None:
            return State("running")
        log = self.folder / "logs" / f"{self.run_dir(trial).name}.log"
        return State("done") if status == 0 else State("failed", f"exit status {status}, see {log}")

    def _read_metric(self, trial: Trial) -> bool:
        """Notes new values of the metric; returns whether the search gives the trial up."""
        is_pruned = False
        for row in read_metrics(self.run_dir(trial)):
            value = row.get(self.config.metric)
            if row["step"] > trial.step and isinstance(value, int | float) and math.isfinite(value):
                trial.step = row["step"]
                trial.value = float(value)
                is_pruned = self._search.report(trial.number, trial.step, trial.value)
        return is_pruned

    def _end(self, trial: Trial, state: str, detail: str = "") -> None:
        trial.state = state
        self._search.tell(trial.number, state, trial.value)
        self._write()
        shown = "no value" if trial.value is None else f"{trial.value:g}"
        best = " (the best so far)" if state == "done" and self.ranked()[0] is trial else ""
        say(f"{trial} {state}: {self.config.metric} {shown}{best}{f'; {detail}' if detail else ''}")

    # The end.

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _frame: Any) -> None:
            self._received = self._received or number

        before = {number: signal.signal(number, note) for number in heeded((signal.SIGINT, signal.SIGTERM))}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, trial: Trial) -> None:
        """Stops a trial after a last checkpoint, and waits for its end."""
        process = self._processes.get(trial.number)
        if process is not None:
            process.terminate()
            process.wait()
            return
        try:
            runs.stop(self.run_dir(trial))
        except runs.ERRORS as error:
            say(f"{trial}: {error}")

    def _followed(self) -> list[Path]:
        return [self.run_dir(trial) for trial in self.trials if not trial.has_ended]

    def _stop_all(self) -> None:
        running = [trial for trial in self.trials if not trial.has_ended]
        if self._array is not None:
            self._array.stop(self._followed())
        for process in self._processes.values():
            process.terminate()
        for trial in running:
            if self._array is None:
                self._stop(trial)
            trial.state = "stopped"
        self._write()


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a sweep's configuration without the keys that may differ when it continues."""
    kept = {key: value for key, value in config.items() if key not in MAY_DIFFER}
    if kept.get("optuna"):
        kept["optuna"] = {key: value for key, value in kept["optuna"].items() if key not in MAY_DIFFER}
    return kept


def _or_worst(value: float | None, sign: int) -> float:
    return sign * math.inf if value is None else value


__all__ = ["Search", "Sweep", "Trial"]

"""Loggers for services that track experiments: MLflow, Weights & Biases, trackio; each is an extra of its own.

A service keeps a run under an id. The id stands in `trackers.json` of the run directory, with the last step that was
sent, so that a run that resumes continues the same curves. No service can take a row back, so of steps that are
repeated after a resume the first rows stay.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import uuid
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import redirect_stdout
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal

from distopt.config import ConfigError
from distopt.launchers import TRACKERS_FILE
from distopt.train.loggers import Logger, RunInfo

CLOSE_S = 30.0
"""How long a run that ends waits for rows that a server has not taken yet."""

_FILE = Lock()  # several trackers write one file, that of MLflow from its thread


class Tracker(Logger):
    """Sends the rows of a run to a service, in the same run of it after a resume.

    A service that fails at the first start of a run ends it, since somebody is there to read why; one that fails later
    is reported once, and training continues.
    """

    name: ClassVar[str]
    """Its name in `log.loggers`, which is that of its package and of the extra."""

    def start(self, run: RunInfo) -> None:
        """Opens the run of the service: that of the run directory for a run that resumes, else a new one."""
        self._path = run.run_dir / TRACKERS_FILE
        record = _read_records(self._path).get(self.name, {}) if run.first_step else {}
        self._last_step = int(record.get("step", 0))
        self._outcome: str | None = None
        self._has_failed = False
        self._is_open = False
        try:
            self._id = self._open(run, record.get("id"))
            self._is_open = True
        except ModuleNotFoundError as error:
            raise ConfigError(
                [f"log.loggers: {self.name} needs the package {error.name}: pip install 'distopt[{self.name}]'"]
            ) from error
        except Exception as error:
            if "id" not in record:
                raise ConfigError([f"log.loggers: {self.name}: {error}"]) from error
            self._report(error)
        else:
            self._note(self._last_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a row, unless an earlier process of the run has sent one of this step or of a later one."""
        if not self._is_open or step <= self._last_step:
            return
        try:
            self._send(step, dict(values))
        except Exception as error:
            self._report(error)

    def finish(self, outcome: Literal["done", "stopped"]) -> None:
        """Notes how the run ended."""
        self._outcome = outcome

    def close(self) -> None:
        """Ends the run of the service, as failed if nothing was said about its end."""
        if not self._is_open:
            return
        try:
            self._close(self._outcome or "failed")
        except Exception as error:
            self._report(error)

    @abstractmethod
    def _open(self, run: RunInfo, run_id: str | None) -> str:
        """Opens the run with this id, or a new one; returns its id."""

    @abstractmethod
    def _send(self, step: int, values: dict[str, float]) -> None:
        """Sends a row, and calls `_note` when that is done."""

    @abstractmethod
    def _close(self, outcome: str) -> None:
        """Ends the run: `done`, `stopped` or `failed`."""

    def _note(self, step: int) -> None:
        """Records in the run directory that the rows up to a step are sent."""
        self._last_step = step
        with _FILE:
            records = _read_records(self._path) | {self.name: {"id": self._id, "step": step}}
            written = self._path.with_suffix(".tmp")
            written.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
            os.replace(written, self._path)

    def _report(self, error: BaseException) -> None:
        if not self._has_failed:
            print(f"distopt: {self.name}: {error}; training continues", file=sys.stderr, flush=True)
        self._has_failed = True


class MlflowLogger(Tracker):
    """Logs to MLflow: the configuration as parameters, each row as metrics.

    Rows are sent by a thread, since a server that does not answer is asked again for minutes.

    Args:
        experiment: Name of the experiment, which is made if it is not there.
        tracking_uri: Address of the server, or `sqlite:///mlflow.db`; null takes `MLFLOW_TRACKING_URI`.
    """

    name = "mlflow"

    def __init__(self, experiment: str = "distopt", tracking_uri: str | None = None) -> None:
        self._experiment = experiment
        self._tracking_uri = tracking_uri

    def _open(self, run: RunInfo, run_id: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=self._tracking_uri)
        params = {key: str(value) for key, value in _flat(run.config)}
        if run_id is None:
            experiment = self._client.get_experiment_by_name(self._experiment)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
            run_id = str(self._client.create_run(experiment_id, run_name=run.name).info.run_id)
            self._client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
        else:
            self._client.update_run(run_id, status="RUNNING")
            self._tag_changes(run_id, params, run.first_step)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="distopt-mlflow")
        self._pending: list[Future[None]] = []
        return run_id

    def _tag_changes(self, run_id: str, params: Mapping[str, str], step: int) -> None:
        """Adds tags for what the run resumes with: a parameter of MLflow cannot be changed."""
        before = self._client.get_run(run_id).data.params
        for key, value in params.items():
            if before.get(key) != value:
                self._client.set_tag(run_id, f"{key} from step {step}", value)

    def _send(self, step: int, values: dict[str, float]) -> None:
        now_ms = int(1000 * time.time())
        row = [self._metric(key, value, now_ms, step) for key, value in values.items()]
        self._pending = [each for each in self._pending if not each.done()]
        self._pending.append(self._pool.submit(self._send_row, step, row))

    def _send_row(self, step: int, row: list[Any]) -> None:
        try:
            self._client.log_batch(self._id, metrics=row)
            self._note(step)
        except Exception as error:
            self._report(error)

    def _close(self, outcome: str) -> None:
        unsent = wait(self._pending, timeout=CLOSE_S).not_done
        self._pool.shutdown(wait=not unsent, cancel_futures=True)
        if unsent:
            raise TimeoutError(f"{len(unsent)} rows were not sent within {CLOSE_S:g} s")
        status = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[outcome]
        self._client.set_terminated(self._id, status)


class WandbLogger(Tracker):
    """Logs to Weights & Biases; its files are in `wandb/` of the run directory.

    Args:
        project: Name of the project.
        **init_args: What `wandb.init` takes, such as `mode: offline` (`wandb sync` uploads it later), `entity`, `tags`.
    """

    name = "wandb"

    def __init__(self, project: str = "distopt", **init_args: Any) -> None:
        self._init_args = {"project": project} | init_args

    def _open(self, run: RunInfo, run_id: str | None) -> str:
        import wandb

        run_id = run_id or uuid.uuid4().hex[:8]
        # The output of a rank has its log already, and a banner would break the progress bar.
        settings = wandb.Settings(console="off", silent=True)
        defaults = {"name": run.name, "dir": str(run.run_dir), "config": dict(run.config), "settings": settings}
        self._run: Any = wandb.init(**(defaults | self._init_args), id=run_id, resume="allow")
        return run_id

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)
        self._note(step)

    def _close(self, outcome: str) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(outcome != "done"))


class TrackioLogger(Tracker):
    """Logs to trackio, by default to its folder on this machine, which `trackio show` shows.

    Args:
        project: Name of the project.
        **init_args: What `trackio.init` takes, such as `space_id` or `server_url`.
    """

    name = "trackio"

    def __init__(self, project: str = "distopt", **init_args: Any) -> None:
        self._init_args = {"project": project, "auto_log_cpu": False} | init_args

    def _open(self, run: RunInfo, run_id: str | None) -> str:
        import trackio

        # trackio finds a run by its name, and several may be called as the run is.
        name = run_id or f"{run.name}-{uuid.uuid4().hex[:8]}"
        resume = "never" if run_id is None else "allow"
        with redirect_stdout(io.StringIO()):
            self._run = trackio.init(name=name, config=dict(run.config), resume=resume, embed=False, **self._init_args)
        return name

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)
        self._note(step)

    def _close(self, outcome: str) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: Mapping[str, type[Tracker]] = {each.name: each for each in (MlflowLogger, TrackioLogger, WandbLogger)}
"""By their names in `log.loggers`."""


def _read_records(path: Path) -> dict[str, Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return records if isinstance(records, dict) else {}


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys and values of a nested configuration."""
    if isinstance(config, Mapping) and config:
        for key, value in config.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, config

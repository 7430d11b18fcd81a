"""MLflow, Weights & Biases and trackio get every row once, in one run, also after a resume. The libraries are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distopt.config import ConfigError, load_config
from distopt.run_files import read_metrics
from distopt.train.loggers import Loggers, RunInfo
from distopt.train.trackers import TRACKERS, Tracker
from tests.train.runs import ROOT, config, environment, launch_well, run_here

# Each program prints {run id: {"rows": {step: values}, "lr": what the configuration says, "state": how it ended}} of
# what is in a folder. It is a process of its own, since these libraries keep threads.
READ_MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
for run in client.search_runs([client.get_experiment_by_name("distopt").experiment_id]):
    rows = {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        assert len({each.step for each in history}) == len(history)
        for each in history:
            rows.setdefault(each.step, {})[name] = each.value
    assert "launch.env" not in str(run.data.params)
    found[run.info.run_id] = {"rows": rows, "lr": float(run.data.params["optim.args.lr"]), "state": run.info.status,
                              "tags": {k: v for k, v in run.data.tags.items() if not k.startswith("mlflow")}}
"""
# The file is LevelDB's log: blocks of 32 KiB, of records with a header of checksum, length and kind.
READ_WANDB = """
import struct
from wandb.proto.wandb_internal_pb2 import Record
for path in sorted(folder.glob("run/wandb/offline-run-*/*.wandb")):
    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):
            continue
        record, whole = Record.FromString(whole), b""
        if record.HasField("run"):
            run = found.setdefault(record.run.run_id, {"rows": {}})
            entries = {each.key: json.loads(each.value_json) for each in record.run.config.update}
            if entries:
                assert "env" not in entries["launch"]
                run["lr"] = entries["optim"]["args"]["lr"]
        if record.HasField("history"):
            row = {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item}
            step = row.pop("_step", record.history.step.num)
            assert step not in run["rows"]
            run["rows"][step] = row
        if record.HasField("exit"):
            run["state"] = record.exit.exit_code
"""
READ_TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
for name in SQLiteStorage.get_runs("distopt"):
    logs = SQLiteStorage.get_logs("distopt", name)
    rows = {each["step"]: each for each in logs}
    assert len(rows) == len(logs)
    found[name] = {"rows": rows, "lr": SQLiteStorage.get_run_config("distopt", name)["optim"]["args"]["lr"]}
"""
READ = {"mlflow": READ_MLFLOW, "wandb": READ_WANDB, "trackio": READ_TRACKIO}
HEAD = "import json, sys\nfrom pathlib import Path\nfolder, found = Path(sys.argv[1]), {}\n"


def environment_of(folder: Path) -> dict[str, str]:
    more = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "TRACKIO_DIR": str(folder / "trackio")}
    return environment() | more


def read_back(name: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", f"{HEAD}{READ[name]}\nprint(json.dumps(found))", str(folder)],
        env=environment_of(folder),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)  # a first import of MLflow alone may take minutes on a busy machine
@pytest.mark.parametrize("name", TRACKERS)
def test_service_has_every_row_once_in_one_run_after_a_resume(name, tmp_path, monkeypatch) -> None:
    if not os.environ.get("DISTOPT_TEST_LOGGERS"):
        if name != "wandb":
            pytest.skip("CI installs one of three: make test-loggers tests them all")
        pytest.importorskip("wandb", reason="the package wandb is not installed")
    for variable, value in environment_of(tmp_path).items():
        monkeypatch.setenv(variable, value)
    args = {"mode": "offline"} if name == "wandb" else {}
    path = config(
        tmp_path,
        task="tests.train.tasks:Judged",
        task_args={"guide": "AutoDelta"},
        train={"num_steps": 20, "validate_every_steps": 10},
        log={"every_steps": 5, "tensorboard": False, "loggers": [{"name": name, "args": args}]},
        launch={"workers": 2, "env": {"GREETING": "confidential"}},
    )
    launch_well(path)
    first = read_metrics(tmp_path / "run")

    # Resumes from step 10, so that the steps from there to 20 are repeated, and with another learning rate.
    train = [sys.executable, "-m", "distopt.launch", "train", str(path), "train.num_steps=30", "checkpoint.resume=10"]
    more = ["optim.args.lr=0.02", "launch.workers=1"]
    done = subprocess.run([*train, *more], cwd=ROOT, env=environment_of(tmp_path), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = {row["step"]: row for row in [*first, *read_metrics(tmp_path / "run")[-2:]]}

    ((_, kept),) = read_back(name, tmp_path).items()
    assert sorted(map(int, kept["rows"])) == [5, 10, 15, 20, 25, 30] == sorted(expected)
    for step, row in expected.items():
        logged = kept["rows"][str(step)]
        for key, value in row.items():
            assert key == "step" or logged[key] == pytest.approx(value), (step, key)
    assert {"elbo", "lr", "train_s", "slope", "validation/mse"} <= expected[20].keys()
    assert kept["lr"] in (0.05, 0.02)
    assert kept.get("state") == {"mlflow": "FINISHED", "wandb": 0}.get(name)
    if name == "mlflow":
        assert kept["tags"]["optim.args.lr from step 10"] == "0.02"


class Fake(Tracker):
    """A service whose calls a test answers: no real one fails when it is asked to."""

    name = "wandb"
    opened: list[str | None] = []
    error: Exception | None = None
    sent: dict[int, Mapping[str, float]] = {}
    outcome = ""

    def _open(self, run: RunInfo, run_id: str | None) -> str:
        if self.error is not None:
            raise self.error
        self.opened.append(run_id)
        return run_id or "made"

    def _send(self, step: int, values: dict[str, float]) -> None:
        if self.error is not None:
            raise self.error
        self.sent[step] = values
        self._note(step)

    def _close(self, outcome: str) -> None:
        type(self).outcome = outcome


@pytest.fixture
def fake() -> type[Fake]:
    return type("Fake", (Fake,), {"opened": [], "sent": {}})


def log(service: type[Tracker], folder: Path, first_step: int, steps: range, outcome: Any = None) -> None:
    with Loggers([service()], RunInfo("demo", folder, first_step, 100)) as opened:
        for step in steps:
            opened.log(step, {"elbo": float(step)})
        if outcome is not None:
            opened.finish(outcome)


def test_run_of_the_service_is_kept_over_resumes_and_new_for_a_new_run(tmp_path, fake) -> None:
    log(fake, tmp_path, 0, range(1, 6), "stopped")
    assert fake.outcome == "stopped"
    log(fake, tmp_path, 3, range(4, 9), "done")
    assert fake.outcome == "done"
    log(fake, tmp_path, 0, range(1, 2))
    assert fake.outcome == "failed"
    assert fake.opened == [None, "made", None]
    assert sorted(fake.sent) == list(range(1, 9))


def test_service_that_fails_ends_a_new_run_but_not_one_that_resumes(tmp_path, fake, capsys) -> None:
    fake.error = ConnectionError("no answer")
    with pytest.raises(ConfigError, match="log.loggers: wandb: no answer"):
        log(fake, tmp_path, 0, range(1, 2))
    fake.error = None
    log(fake, tmp_path, 0, range(1, 2))
    fake.error = ConnectionError("no answer")
    log(fake, tmp_path, 1, range(2, 9))
    assert capsys.readouterr().err == "distopt: wandb: no answer; training continues\n"

    fake.error = None
    with Loggers([fake()], RunInfo("demo", tmp_path, 1, 100)) as opened:
        fake.error = ConnectionError("no answer")
        opened.log(2, {"elbo": 1.0})
        opened.log(3, {"elbo": 1.0})
        fake.error = None
        opened.log(4, {"elbo": 1.0})
    assert capsys.readouterr().err.count("training continues") == 1
    assert 4 in fake.sent and 2 not in fake.sent


def test_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    path = config(tmp_path, log={"loggers": ["trackio"]}, train={"num_steps": 1})
    run_here(path, status=1)
    assert "log.loggers: trackio needs the package trackio: pip install 'distopt[trackio]'" in capsys.readouterr().err


def test_every_tracker_is_an_extra_and_a_name_of_the_configuration(tmp_path) -> None:
    for name in TRACKERS:
        assert load_config(config(tmp_path, log={"loggers": [name]})).log.loggers[0].name == name
    with pytest.raises(ConfigError, match="wandbb"):
        load_config(config(tmp_path, log={"loggers": ["wandbb"]}))


class Noting(Tracker):
    """Notes what it is given."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def _open(self, run: RunInfo, run_id: str | None) -> str:
        return self.name

    def _send(self, step: int, values: dict[str, float]) -> None:
        self._note(step)

    def _close(self, outcome: str) -> None:
        pass


def test_trackers_that_note_in_several_threads_keep_each_others_steps(tmp_path: Path) -> None:
    trackers = [Noting(name) for name in "abcd"]
    for each in trackers:
        each.start(RunInfo("run", tmp_path, 0, 100, {}))
    with ThreadPoolExecutor(len(trackers)) as pool:
        sent = [pool.submit(lambda each=each: [each.log(step, {}) for step in range(1, 101)]) for each in trackers]
        for each in sent:
            each.result()
    assert not any(each._has_failed for each in trackers)
    records = json.loads((tmp_path / "trackers.json").read_text())
    assert {name: record["step"] for name, record in records.items()} == dict.fromkeys("abcd", 100)

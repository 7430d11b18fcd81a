"""Validation in real runs: the same decisions on any number of workers, and after a resume."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pyro
import pytest
import yaml
from pyro.infer import Trace_ELBO

from distopt.backends import current
from distopt.backends.single import Single
from distopt.config import ConfigError, RunConfig, load_config
from distopt.data import GlobalBatches
from distopt.infer import SVI
from distopt.launchers import RUN_FILE
from distopt.optim import Adam, DistributedOptimizer
from distopt.rng import seed_all
from distopt.run_files import read_facts, read_metrics
from distopt.train import Session
from distopt.train.task import TaskError
from distopt.train.validation import Mean, Total, Validation
from tests.train.runs import ROOT, config, launch_well, parameters, run_here
from tests.train.tasks import Judged

RULES: dict[str, Any] = {
    "task": "tests.train.tasks:Judged",
    "task_args": {"guide": "AutoDelta"},
    "train": {
        "num_steps": 100,
        "validate_every_steps": 2,
        "early_stopping": {"metric": "mse", "patience": 3, "min_delta": 1e-4},
    },
    "checkpoint": {"every_steps": 10, "keep_best": {"metric": "mse"}, "keep_last": 2},
}


def judged(folder: Path, **changed: Any) -> Path:
    return config(folder, **(RULES | changed))


def outcome(run_dir: Path) -> dict[str, Any]:
    """Returns the decisions of a run: its steps, its best step, the checkpoints it kept."""
    rows = [row for row in read_metrics(run_dir) if "validation/mse" in row]
    return {
        "validated": [row["step"] for row in rows],
        "best": min(rows, key=lambda row: row["validation/mse"])["step"],
        "kept": sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*")),
        "outcome": read_facts(run_dir)["outcome"],
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    output = launch_well(judged(folder), "log.tensorboard=true")
    assert "stopped early after step" in output and "mse has not improved in 3 validations" in output
    return folder / "run"


def test_run_stops_early_with_its_best_checkpoint_kept(on_two: Path) -> None:
    decided = outcome(on_two)
    last = decided["validated"][-1]
    assert last < 100 and decided["best"] < last and decided["outcome"] == "done"
    assert decided["best"] in decided["kept"] and last in decided["kept"]
    assert len(decided["kept"]) <= 3
    row = read_metrics(on_two)[-1]
    assert row["validation/rows"] == 701 and row["validation/rank"] == 0.5
    assert row["lr"] == 0.05 and row["train_s"] > 0 and -4 < row["slope"] < 0
    facts = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", (on_two / "report.html").read_text()))
    assert facts["best checkpoint"] == f"step {decided['best']}" and "has not improved in 3" in facts["ended early"]


def test_tensorboard_has_what_every_logger_gets(on_two: Path) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(on_two / "tensorboard")).Reload()
    last = read_metrics(on_two)[-1]
    assert {"elbo", "lr", "train_s", "rows_per_s", "validation/mse", "slope"} <= last.keys()
    for name in last.keys() - {"step"}:
        written = events.Scalars(name)[-1]
        assert (written.step, written.value) == (last["step"], pytest.approx(last[name], rel=1e-5)), name


def test_decisions_are_the_same_on_another_number_of_workers(on_two: Path, tmp_path: Path) -> None:
    run_here(judged(tmp_path))
    assert outcome(tmp_path / "run") == outcome(on_two)
    values = [
        [row["validation/mse"] for row in read_metrics(each) if "validation/mse" in row]
        for each in (on_two, tmp_path / "run")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_decisions_are_the_same_on_four_workers(on_two: Path, tmp_path: Path) -> None:
    launch_well(judged(tmp_path), "launch.workers=4", "launch.oversubscribe=true")
    assert outcome(tmp_path / "run") == outcome(on_two)


@pytest.mark.slow
def test_run_that_was_interrupted_decides_as_an_undisturbed_one_and_is_done_when_it_was(tmp_path, capsys) -> None:
    path = judged(tmp_path)
    run_here(path, f"run_dir={tmp_path / 'through'}")
    expected = outcome(tmp_path / "through")
    last = expected["validated"][-1]
    for num_steps in (last - 5, last - 3, 100, 100):
        capsys.readouterr()
        run_here(path, f"train.num_steps={num_steps}")
    assert f"stopped early after step {last}" in capsys.readouterr().out
    decided = outcome(tmp_path / "run")
    assert {key: decided[key] for key in ("best", "outcome")} == {key: expected[key] for key in ("best", "outcome")}
    assert max(decided["kept"]) == last and expected["best"] in decided["kept"]
    for name, value in parameters(tmp_path / "through").items():
        assert value.equal(parameters(tmp_path / "run")[name])
    assert read_facts(tmp_path / "run")["num_starts"] == 4 and (tmp_path / "run" / RUN_FILE).exists()

    run_here(path, "train.early_stopping=null", f"train.num_steps={last + 2}")  # what stopped it no longer does
    assert max(outcome(tmp_path / "run")["kept"]) == last + 2


def train_in_script(loaded: RunConfig) -> None:
    """Trains what the task does, in a loop of a script's own."""
    pyro.clear_param_store()
    seed_all(loaded.seed)
    task, worker = Judged(guide="AutoDelta"), current()
    world = (worker.rank, worker.world_size)
    batches = GlobalBatches(task.rows(), loaded.data.global_batch, loaded.seed, *world)
    optimizer = DistributedOptimizer(Adam({"lr": 0.05}))
    svi = SVI(task.model, task.guide, optimizer, Trace_ELBO())
    seed_all(loaded.seed)
    svi.init(*task.batch(GlobalBatches(task.rows(), loaded.data.global_batch, loaded.seed).rows(0)))
    optimizer.synchronize()
    with Session({"optimizer": optimizer}, config=loaded, validate=task.validate) as session:
        for step in session.steps():
            session.log(elbo=-svi.step(*task.batch(batches.rows(step))))


@pytest.mark.slow
def test_loop_of_a_script_decides_as_a_task_also_when_it_resumes(tmp_path, capsys) -> None:
    path = judged(tmp_path)
    run_here(path)
    last = outcome(tmp_path / "run")["validated"][-1]
    for num_steps in (last - 3, 100):
        capsys.readouterr()
        train_in_script(load_config(path, [f"run_dir={tmp_path / 'script'}", f"train.num_steps={num_steps}"]))
    assert f"stopped early after step {last}" in capsys.readouterr().out
    decided, expected = outcome(tmp_path / "script"), outcome(tmp_path / "run")
    assert {key: decided[key] for key in ("validated", "best", "outcome")} == {
        key: expected[key] for key in ("validated", "best", "outcome")
    }
    assert max(decided["kept"]) == last and expected["best"] in decided["kept"]
    for name, value in parameters(tmp_path / "run").items():
        assert value.equal(parameters(tmp_path / "script")[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, 4])
def test_loop_of_a_script_decides_as_a_task_on_several_workers(on_two: Path, tmp_path: Path, num_workers: int) -> None:
    lines = [
        "import distopt",
        "worker = distopt.init()",
        "from distopt.train.session import config_of_script",
        "from tests.train.test_validation import train_in_script",
        "train_in_script(config_of_script())",
    ]
    (tmp_path / "fit.py").write_text("\n".join(lines))
    rules = {key: value for key, value in RULES.items() if not key.startswith("task")}
    keys = yaml.safe_load(config(tmp_path, **rules, script=str(tmp_path / "fit.py")).read_text())
    del keys["task"]
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(keys))
    more = [f"launch.workers={num_workers}", "launch.oversubscribe=true", f"launch.env={{PYTHONPATH: {ROOT}}}"]
    launch_well(tmp_path / "line.yaml", *more)
    assert outcome(tmp_path / "run") == outcome(on_two)


@pytest.mark.parametrize("key", ["train.early_stopping", "checkpoint.keep_best"])
def test_rule_without_validation_or_of_an_unknown_metric_is_refused(tmp_path, capsys, key) -> None:
    rules = RULES | {"train": {"num_steps": 4}, "checkpoint": {}}
    path = config(tmp_path, **rules)
    with pytest.raises(ConfigError, match=f"found {key} without train.validate_every_steps"):
        load_config(path, [f"{key}={{metric: rmse}}"])
    run_here(path, f"{key}={{metric: rmse}}", "train.validate_every_steps=2", status=1)
    assert f"{key}.metric: found rmse, but validate() of tests.train.tasks:Judged returns mse, rows" in (
        capsys.readouterr().err
    )


class Gathering(Single):
    """A world of one that is shown what other ranks would have sent."""

    def __init__(self, *others: Any) -> None:
        super().__init__()
        self.others = others

    def all_gather_json(self, value: Any, timeout: Any = None) -> list[Any]:
        return [value, *self.others]


class Returning:
    def __init__(self, metrics: Any) -> None:
        self.returned = metrics

    def validate(self) -> Any:
        return self.returned


def validation(tmp_path: Path, metrics: Any, *others: Any) -> Validation:
    loaded = load_config(judged(tmp_path, train={"validate_every_steps": 1}, checkpoint={}))
    return Validation(loaded, Returning(metrics).validate, Gathering(*others))


def test_parts_are_weighted_by_their_rows_and_sums_are_added(tmp_path) -> None:
    other = {"metrics": {"mse": ["mean", "9.0", "3.0"], "n": ["total", "3.0"], "x": ["mean", "nan", "1.0"]}}
    measured = validation(tmp_path, {"mse": Mean(1.0, 1), "n": Total(1), "x": 1.0}, other)
    measured.run(1)
    assert measured.values["mse"] == 2.5 and measured.values["n"] == 4 and math.isnan(measured.values["x"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"error": "validate() raised ValueError: no rows"}, "rank 1 of 2: validate.. raised ValueError: no rows"),
        ({"metrics": {}}, "returns mse on rank 0 and nothing on rank 1"),
        ({"metrics": {"mse": ["total", "1.0"]}}, "returns mse on rank 0 and mse on rank 1"),
    ],
)
def test_rank_that_fails_or_measures_something_else_is_named(tmp_path, other, message) -> None:
    with pytest.raises(TaskError, match=message):
        validation(tmp_path, {"mse": 1.0}, other).run(1)


def test_rule_that_changed_starts_anew(tmp_path) -> None:
    loaded = load_config(judged(tmp_path))
    saved = {"keep_best": {"metric": "mae", "mode": "min", "value": 1.0, "step": 3, "num_worse": 0}}
    kept = Validation(loaded, Returning({}).validate, Single())
    kept.load_state(saved)
    assert kept.best_step is None
    saved["keep_best"]["metric"] = "mse"
    kept.load_state(saved)
    assert kept.best_step == 3 and yaml.safe_load(yaml.safe_dump(kept.state()))["keep_best"]["value"] == 1.0

"""Sweeps: which trials run, that they continue after a kill, are pruned and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from distopt.config import ConfigError
from distopt.config.sweep_schema import RangeConfig, SweepConfig, as_overrides, load_sweep
from launch.jobs import JobError
from launch.searches import OptunaSearch
from launch.sweep import Sweep, Trial
from tests.train.runs import BIN, ROOT, environment

RUN = {"name": "line", "task": "tests.train.tasks:Line", "optim": {"name": "Adam", "args": {"lr": 0.05}}}
GRID = {"name": "demo", "run": "line.yaml", "grid": {"optim.args.lr": [0.1, 0.01], "seed": [1, 2]}}
SPACE = {"optim.args.lr": {"low": 0.001, "high": 1.0, "log": True}, "seed": {"low": 1, "high": 9}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "line.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


def sweep_of(**changed: Any) -> SweepConfig:
    Path("sweep.yaml").write_text(yaml.safe_dump(GRID | changed))
    return load_sweep("sweep.yaml")


# A trial that writes its metrics and ends at once stands for a run of the launcher, which takes seconds.
TRIAL = """
import json, sys, time
from pathlib import Path
number, status = int(sys.argv[1]), int(sys.argv[3])
folder = Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
for step in range(1, 6):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "elbo": -(10.0 * number + 1) / step}) + "\\n")
    time.sleep(0.6 if number in map(int, sys.argv[4:]) else 0)
sys.exit(status)
"""


class Quick(Sweep):
    """A sweep of such trials; those of `failing` fail, those of `slow` take seconds."""

    failing: tuple[int, ...] = ()
    slow: tuple[int, ...] = ()

    def _command(self, trial: Trial) -> list[str]:
        status = int(trial.number in self.failing)
        return [
            sys.executable,
            "-c",
            TRIAL,
            str(trial.number),
            str(self.run_dir(trial)),
            str(status),
            *map(str, self.slow),
        ]


def test_grid_runs_every_combination_and_ranks_them(capfd) -> None:
    sweep = Quick(sweep_of(parallel=3))
    sweep.failing = (2,)
    assert sweep.run() == 1
    assert [trial.values for trial in sweep.trials] == [
        {"optim.args.lr": lr, "seed": seed} for lr in (0.1, 0.01) for seed in (1, 2)
    ]
    assert [trial.number for trial in sweep.ranked()] == [0, 1, 3, 2]
    assert [(trial.state, trial.value, trial.step) for trial in sweep.ranked()[:2]] == [
        ("done", -0.2, 5),
        ("done", -2.2, 5),
    ]
    assert "trial 0 (optim.args.lr=0.1, seed=1) done: elbo -0.2 (the best so far)" in capfd.readouterr().err

    again = Quick(sweep_of(parallel=1))
    assert again.run() == 1 and again.trials == sweep.trials
    with pytest.raises(ConfigError, match="is of a sweep with another grid; choose another name"):
        Quick(sweep_of(grid={"seed": [1]})).run()


def test_trials_continue_where_a_killed_sweep_left_them() -> None:
    sweep = Quick(sweep_of())
    with sweep._locked(), pytest.raises(JobError, match="in use by another"):
        Quick(sweep_of()).run()
    # As a sweep that was killed leaves it: one trial is done, one has been recorded and never started.
    sweep.trials = [
        Trial(0, {"optim.args.lr": 0.1, "seed": 1}, "done", -7.0, 5),
        Trial(1, {"optim.args.lr": 0.1, "seed": 2}),
    ]
    sweep._write()
    assert Quick(sweep_of()).run() == 0
    trials = json.loads(Path("runs/demo/sweep.json").read_text())["trials"]
    assert [(trial["state"], trial["value"]) for trial in trials] == [
        ("done", -7.0), ("done", -2.2), ("done", -4.2), ("done", -6.2)
    ]  # fmt: skip
    assert not Path("runs/demo-000").exists()


def test_signal_stops_the_trials_and_the_sweep() -> None:
    sweep = Quick(sweep_of(parallel=2))
    sweep.slow = (0, 1)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        assert sweep.run() == 130
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [trial.state for trial in sweep.trials] == ["stopped", "stopped"]
    assert Quick(sweep_of(parallel=2)).run() == 0


def test_optuna_suggests_prunes_and_remembers() -> None:
    pytest.importorskip("optuna", reason="the package optuna is not installed")
    search = {"num_trials": 5, "space": SPACE, "sampler_args": {"seed": 3}, "pruner": "MedianPruner",
              "pruner_args": {"n_startup_trials": 2, "n_warmup_steps": 1}}  # fmt: skip
    sweep = Quick(sweep_of(grid=None, optuna=search))
    sweep.slow = (4,)
    assert sweep.run() == 0
    # Each trial is worse than all before it, so the last one, which takes long enough to be looked at, is given up.
    assert [trial.state for trial in sweep.trials] == ["done"] * 4 + ["pruned"]
    assert all(
        0.001 <= trial.values["optim.args.lr"] <= 1 and trial.values["seed"] in range(1, 10) for trial in sweep.trials
    )
    assert len({trial.values["optim.args.lr"] for trial in sweep.trials}) == 5

    import optuna

    study = OptunaSearch(sweep.config, sweep.folder, 5)._study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4 + ["PRUNED"]
    assert study.best_value == -0.2 and study.best_trial.params == sweep.ranked()[0].values
    study.ask({key: optuna.distributions.IntDistribution(1, 9) for key in ("seed",)})  # the sweep is killed here

    more = Quick(sweep_of(grid=None, optuna=search | {"num_trials": 6}))
    assert more.run() == 0 and len(more.trials) == 6 and more.trials[:5] == sweep.trials
    states = [trial.state.name for trial in OptunaSearch(more.config, more.folder, 6)._study.trials]
    assert states == ["COMPLETE"] * 4 + ["PRUNED", "FAIL", "COMPLETE"]


@pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental")
@pytest.mark.parametrize(
    ("sampler", "args"), [("GridSampler", {"search_space": {"seed": [1, 2]}}), ("BruteForceSampler", {})]
)
@pytest.mark.parametrize("parallel", [1, 2])
def test_sampler_of_a_finite_space_ends_the_sweep_with_each_value_tried_once(sampler, args, parallel) -> None:
    pytest.importorskip("optuna", reason="the package optuna is not installed")
    search = {"num_trials": 9, "space": {"seed": {"choices": [1, 2]}}, "sampler": sampler, "sampler_args": args}
    for _ in range(2):  # the same command again has nothing left to do
        sweep = Quick(sweep_of(grid=None, optuna=search, parallel=parallel))
        assert sweep.run() == 0
        assert sorted(trial.values["seed"] for trial in sweep.trials) == [1, 2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grid": None}, "expected either grid or optuna"),
        ({"grid": {"optim.args.lr": []}}, "grid.optim.args.lr"),
        ({"grid": {"train.num_step": [1]}}, "Did you mean train.num_steps"),
        ({"grid": {"train.num_steps": [1, "many"]}}, "found 'many'"),
        ({"mode": "best"}, "mode: "),
        ({"name": "../x"}, "name: "),
        ({"run": "other.yaml"}, "other.yaml: no such file"),
        ({"grid": None, "optuna": {"num_trials": 1, "space": {"seed": {"low": 1}}}}, "either low and high, or choices"),
        ({"parallel": 0}, "parallel: "),
    ],
)
def test_mistake_is_named_before_anything_starts(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(**changed)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"low": 1, "choices": [1]}, "either low and high, or choices"),
        ({"low": 2, "high": 1}, "low to be the smaller one"),
        ({"low": 0, "high": 1, "log": True}, "found low 0 with log"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "none together with log"),
        ({"low": 1, "high": 9, "step": 0}, "a distance above 0"),
    ],
)
def test_range_without_values_is_named_before_anything_starts(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"optuna.space.seed: .*{message}"):
        sweep_of(grid=None, optuna={"num_trials": 1, "space": {"seed": space}})


def test_range_is_of_whole_numbers_if_all_that_describes_it_are() -> None:
    assert RangeConfig(low=1, high=9).is_integer and RangeConfig(low=1, high=9, step=2).is_integer
    assert not RangeConfig(low=1, high=9, step=0.5).is_integer and not RangeConfig(low=1, high=9.5).is_integer


def test_runs_of_an_earlier_sweep_are_not_taken_for_trials() -> None:
    earlier = Path("runs/demo-002")
    earlier.mkdir(parents=True)
    (earlier / "launch.json").write_text('{"status": 0, "pid": 1, "host": "here"}')
    with pytest.raises(ConfigError, match="runs/demo-002 is there, and runs/demo/sweep.json has no trial 2"):
        Quick(sweep_of()).run()
    assert not Path("runs/demo-000").exists()
    earlier.rename("elsewhere")
    assert Quick(sweep_of()).run() == 0


def test_folder_that_cannot_be_made_is_named() -> None:
    Path("runs").write_text("a file")
    with pytest.raises(ConfigError, match="name: runs/demo cannot be written to: Not a directory"):
        Sweep(sweep_of())


def test_search_has_no_combinations_and_is_no_job_array() -> None:
    search = sweep_of(grid=None, optuna={"num_trials": 3, "space": SPACE}, overrides=["launch.platform=slurm"])
    assert search.combinations() == []
    assert Sweep(search)._array is None
    assert Sweep(sweep_of(overrides=["launch.platform=slurm"]))._array is not None


def test_array_finds_its_runs_where_the_folder_of_the_sweep_is_a_link(folder: Path) -> None:
    (folder / "scratch/demo").mkdir(parents=True)
    (folder / "runs").mkdir()
    (folder / "runs/demo").symlink_to(folder / "scratch/demo")
    sweep = Sweep(sweep_of(overrides=["launch.platform=slurm"]))
    assert sweep._array is not None
    prefix = sweep._array._array.prefix  # type: ignore[attr-defined]
    assert Path(f"{prefix}000") == sweep.run_dir(Trial(0, {})).absolute()


def test_class_that_optuna_does_not_have_is_refused() -> None:
    pytest.importorskip("optuna", reason="the package optuna is not installed")
    for key, args in (("sampler", {}), ("pruner", {})):
        config = sweep_of(grid=None, optuna={"num_trials": 1, "space": SPACE, key: "Nothing", **args})
        with pytest.raises(ConfigError, match=f"optuna.{key}: found Nothing; Optuna has .*{key.capitalize()}"):
            Quick(config).run()


def test_values_are_yaml_on_the_command_line() -> None:
    values = {"a": "1", "b": [1, "x y"], "c": None, "d": True, "e": {"k": 1e-05}}
    texts = [text.partition("=")[2] for text in as_overrides(values)]
    assert [yaml.safe_load(text) for text in texts] == list(values.values())


def test_sweep_that_is_killed_continues_with_runs_that_go_on(folder: Path) -> None:
    """Real runs: `kill -9` of the sweep leaves them, and the same command follows them to their end."""
    keys = {"grid": {"seed": [1, 2]}, "parallel": 2, "overrides": ["train.num_steps=400", "launch.workers=1",
            "log.every_steps=10", "log.tensorboard=false", "optim.args.lr=0.01"]}  # fmt: skip
    sweep_of(**keys)
    command = [str(BIN / "distopt"), "sweep", "sweep.yaml"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not all((folder / f"runs/demo-{number:03d}/run.json").exists() for number in (0, 1)):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    first.kill()
    first.wait()

    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((folder / "runs/demo/sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["done", "done"] and len({trial["value"] for trial in trials}) == 2
    for number in (0, 1):
        assert json.loads((folder / f"runs/demo-{number:03d}/run.json").read_text())["num_starts"] == 1
        assert f"demo-{number:03d}" in done.stdout
    page = (folder / "runs/demo/sweep.html").read_text()
    assert page.count("<figure>") == 2 and "demo-000" in page


@pytest.mark.slow
@pytest.mark.timeout(520)
def test_optuna_prunes_runs_of_two_workers(folder: Path) -> None:
    pytest.importorskip("optuna", reason="the package optuna is not installed")
    rates = [0.1, 1.0e-6]
    search = {
        "num_trials": 3,
        "space": {"optim.args.lr": {"choices": rates}},
        "sampler": "GridSampler",
        "sampler_args": {"search_space": {"optim.args.lr": rates}},
        "pruner": "ThresholdPruner",
        "pruner_args": {"lower": -1500.0, "n_warmup_steps": 300},  # of a line that is found, the ELBO is about -400
    }
    overrides = ["train.num_steps=2000", "launch.workers=2", "log.every_steps=10"]
    sweep_of(grid=None, overrides=overrides, optuna=search)
    command = [str(BIN / "distopt"), "sweep", "sweep.yaml"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads((folder / "runs/demo/sweep.json").read_text())["trials"]
    assert {trial["values"]["optim.args.lr"]: trial["state"] for trial in trials} == {0.1: "done", 1e-6: "pruned"}

"""From which checkpoint a run resumes or starts, and what may have changed since."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from distopt.checkpoint.pyro_files import read_replicated
from distopt.optim.state import optimizer_state
from tests.train.runs import config, launch_well, parameters, run_here


def newest(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def states(run_dir: Path) -> dict:
    (states,) = read_replicated(newest(run_dir))["optimizers"].values()
    return states


def hyper(run_dir: Path) -> dict:
    """Returns the hyper-parameters that all parameters share."""
    groups = [optimizer_state(state)["param_groups"][0] for state in states(run_dir).values()]
    assert groups and all(group == groups[0] for group in groups)
    return groups[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that has ended after 20 steps."""
    folder = tmp_path_factory.mktemp("saved")
    launch_well(config(folder, train={"num_steps": 20}))
    return folder / "run"


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """The YAML of a copy of that run."""
    shutil.copytree(saved, tmp_path / "run")
    return config(tmp_path, train={"num_steps": 20})


@pytest.mark.slow
def test_optimizer_follows_the_config_and_the_log_says_from_which_step(path, tmp_path, capsys):
    changes = ["optim.args={lr: 0.005, weight_decay: 0.1}", "optim.clip.global_norm=5.0", "train.num_steps=24"]
    before = states(tmp_path / "run")
    run_here(path, *changes)
    output = capsys.readouterr().out
    assert "resuming from step 20" in output and "num_steps 20 -> 24" in output
    for line in ("lr 0.05 -> 0.005", "weight_decay default -> 0.1", "global_norm none -> 5.0"):
        assert f"{line} from step 21\n" in output, output
    assert (hyper(tmp_path / "run")["lr"], hyper(tmp_path / "run")["weight_decay"]) == (0.005, 0.1)
    for name, state in states(tmp_path / "run").items():
        assert state["state"][0]["step"] == before[name]["state"][0]["step"] + 4

    run_here(path, *changes)
    assert "->" not in capsys.readouterr().out


def test_arguments_by_name_are_of_the_parameters_that_match(path, tmp_path, capsys):
    pattern = "optim.args_by_name={'AutoNormal.scales.*': {lr: 0.001}}"
    run_here(path, pattern, "train.num_steps=22")
    rates = {name: state["param_groups"][0]["lr"] for name, state in states(tmp_path / "run").items()}
    assert rates == {name: 0.001 if ".scales." in name else 0.05 for name in rates} and len(rates) == 6
    assert "lr 0.05 -> 0.001 of 3 parameters" in capsys.readouterr().out
    run_here(path, "optim.args_by_name={'*': {rate: 1}}", "train.num_steps=22", status=1)
    assert "optim.args_by_name.*: " in capsys.readouterr().err


def test_new_schedule_is_at_the_step_of_the_run(path, tmp_path, capsys):
    run_here(path, "optim.scheduler={name: ExponentialLR, args: {gamma: 0.9}, every_steps: 2}", "train.num_steps=24")
    assert "schedule none -> ExponentialLR(gamma=0.9) from step 21" in capsys.readouterr().out
    assert hyper(tmp_path / "run")["lr"] == pytest.approx(0.05 * 0.9**12)


def test_schedule_that_ends_before_the_run_is_refused_before_the_first_step(path, capsys):
    schedule = "optim.scheduler={name: OneCycleLR, args: {max_lr: 0.1, total_steps: 22}}"
    run_here(path, schedule, "train.num_steps=23", status=1)
    error = capsys.readouterr().err
    assert "optim.scheduler.args.total_steps: found 22, but train.num_steps makes 23 steps" in error, error
    run_here(path, schedule, "train.num_steps=22")


@pytest.mark.parametrize("change", ["optim.name=Adamax", "data.global_batch=50"])
def test_refusal_names_keys_that_cure_it(path, capsys, change):
    run_here(path, change, "train.num_steps=22", status=1)
    error = capsys.readouterr().err
    assert change.partition("=")[0] in error
    cures = ["checkpoint.resume_only=[params]", "checkpoint.resume=never", f"run_dir={path.parent / 'other'}"]
    for cure in cures:
        assert cure.partition("=")[0] in error, error
    run_here(path, change, "train.num_steps=22", cures[2])
    run_here(path, change, "train.num_steps=22", cures[0])
    run_here(path, change, "train.num_steps=22", cures[1])


@pytest.mark.slow
def test_parameters_alone_are_taken_with_a_new_optimizer_once_and_later_all(path, tmp_path, capsys):
    override = ["optim={name: SGD, args: {lr: 1e-6, momentum: 0.9}}", "checkpoint.resume_only=[params]"]
    run_here(path, *override, "train.num_steps=20")
    assert "resuming from step 20" in capsys.readouterr().out
    run_here(path, *override, "train.num_steps=30")
    assert "params only" in capsys.readouterr().out
    run_here(path, *override, "train.num_steps=40")
    assert "params only" not in capsys.readouterr().out

    shutil.copytree(tmp_path / "run", tmp_path / "through")
    shutil.rmtree(tmp_path / "through" / "checkpoints")
    first = "checkpoints/step-00000020"
    shutil.copytree(tmp_path / "run" / first, tmp_path / "through" / first)
    run_here(path, *override, "train.num_steps=40", f"run_dir={tmp_path / 'through'}")
    for name, value in parameters(tmp_path / "through").items():
        assert torch.equal(value, parameters(tmp_path / "run")[name]), name


@pytest.mark.parametrize("only", ["null", "[params]"])
def test_run_starts_from_the_parameters_of_another_one_and_resumes_from_its_own(saved, tmp_path, capsys, only):
    start = [f"checkpoint.resume={saved}", f"checkpoint.resume_only={only}", "seed=7", "optim.args.lr=1e-9"]
    path = config(tmp_path, run_dir=str(tmp_path / "tuned"), checkpoint={"every_steps": 2})
    run_here(path, *start, "train.num_steps=4")
    output = capsys.readouterr().out
    assert "starting from the checkpoint of another run at step 20" in output
    for name, value in parameters(saved).items():
        torch.testing.assert_close(parameters(tmp_path / "tuned")[name], value, rtol=1e-6, atol=1e-6)
    steps_of_moments = {int(state["state"][0]["step"]) for state in states(tmp_path / "tuned").values()}
    assert steps_of_moments == ({24} if only == "null" else {4})
    assert newest(tmp_path / "tuned").name == "step-00000004"

    run_here(path, *start, "train.num_steps=6")
    assert "resuming from step 4" in capsys.readouterr().out

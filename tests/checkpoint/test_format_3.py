"""Checkpoints that distopt wrote in format 3 load today, with the numbers that plain torch computes for their runs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch import nn

import distopt.optim
from distopt.backends import current
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, ConfigMismatchError
from distopt.checkpoint.pyro_files import export_optimizer, export_params, read_replicated
from distopt.config import load_config
from distopt.infer import gather_local, sharded_plate
from distopt.sharding import local_parameters
from distopt.train import run
from tests import workers
from tests.checkpoint.format_3 import task
from tests.checkpoint.runs import command

FOLDER = Path(__file__).parent / "format_3"
NUM_ROWS = 5  # of the sharded plate of two_ranks
ROWS_OF_RANK = ([0, 1], [2, 3, 4])


@pytest.fixture
def folder(tmp_path):
    """A copy, since whoever opens a checkpoint locks its directory."""
    return shutil.copytree(FOLDER, tmp_path / "format_3")


def seed_of(seed, step, rank):
    """The seed of a rank at a step: see Knuth's multiplicative hashing, with 2**32 over the golden ratio."""
    (base,) = np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)
    return (int(base) + rank * 0x9E3779B1) % 2**32


def assert_rng_is_seeded(seed):
    """The three generators of this process stand where that seed puts them."""
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(seed).get_state())
    assert np.array_equal(np.random.get_state()[1], np.random.RandomState(seed).get_state()[1])
    assert random.getstate() == random.Random(seed).getstate()


def line_by_torch(num_steps):
    """Returns parameters, Adam's state and the schedule of the run of `run.yaml`, by the formula of its loss."""
    weight, bias = nn.Parameter(torch.tensor(task.WEIGHT)), nn.Parameter(torch.tensor(task.BIAS))
    log_scale = nn.Parameter(torch.tensor(task.SCALE).log())
    params = {"line$$$weight": weight, "line$$$bias": bias, "AutoDelta.scale": log_scale}
    optimizer = torch.optim.Adam(params.values(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for step in range(num_steps):
        optimizer.zero_grad()
        squares = ((task.Y - (task.X @ weight.T + bias).squeeze(-1)) ** 2).sum()
        prior = -log_scale - log_scale**2 / 2
        likelihood = -task.NUM_ROWS * log_scale - squares / (2 * (2 * log_scale).exp())
        (-(prior + likelihood)).backward()
        optimizer.step()
        if (step + 1) % 2 == 0:
            schedule.step()
    return params, {name: optimizer.state[param] for name, param in params.items()}, schedule


def assert_adam_state(state, expected):
    """One parameter's state equals that of torch's optimizer."""
    for key, value in expected.items():
        torch.testing.assert_close(state["state"][0][key], value, rtol=1e-4, atol=1e-6)


def test_run_of_one_rank_when_restored_has_the_numbers_of_plain_torch(folder):
    made = task.Line()
    optimizer = distopt.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}, {"clip_norm": 1000.0}
    )
    modules = {"model": made.model, "guide": made.guide}
    with Checkpointer(folder / "one_rank", {"optimizer": optimizer, **modules}, backend=Single()) as checkpointer:
        restored = checkpointer.restore()
    assert (restored.step, restored.progress, restored.world_size) == (3, None, 1)
    assert_rng_is_seeded(seed_of(7, 2, 0))  # each step is seeded, and this one draws nothing

    expected, states, schedule = line_by_torch(3)
    params = dict(pyro.get_param_store().named_parameters())
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-5, atol=1e-6, check_stride=False)
    assert pyro.param("AutoDelta.scale").item() == pytest.approx(expected["AutoDelta.scale"].exp().item(), rel=1e-5)

    optimizer_state = optimizer.get_state()
    assert optimizer_state.keys() == expected.keys()
    for name, state in optimizer_state.items():
        assert_adam_state(state["optimizer"], states[name])
        (group,) = state["optimizer"]["param_groups"]
        assert (group["lr"], group["initial_lr"], group["betas"]) == (0.05 * 0.9, 0.05, (0.9, 0.999))
        assert state["scheduler"]["last_epoch"] == schedule.last_epoch == 1
        assert state["scheduler"]["_last_lr"] == schedule.get_last_lr()
    # Traced once when the guide was set up, once more to make the parameters, then once a step.
    assert made.model.num_rows_seen == (2 + 3) * task.NUM_ROWS


def test_run_of_one_rank_when_resumed_from_its_yaml_ends_as_the_undisturbed_run(folder, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(folder / "one_rank", run_dir / "checkpoints")
    num_threads = torch.get_num_threads()
    try:
        assert run(load_config(FOLDER / "run.yaml", [f"run_dir={run_dir}"])) == 0
    finally:
        torch.set_num_threads(num_threads)
    saved = read_replicated(run_dir / "checkpoints")
    expected, states, schedule = line_by_torch(6)
    for name, value in expected.items():
        torch.testing.assert_close(saved["params"][name]["value"], value.detach(), rtol=1e-4, atol=1e-6)
        assert_adam_state(saved["optimizers"]["optimizer"][name]["optimizer"], states[name])
        assert saved["optimizers"]["optimizer"][name]["scheduler"]["last_epoch"] == schedule.last_epoch == 3
    assert not any(b"not-recorded" in path.read_bytes() for path in folder.glob("one_rank/*/*"))


def test_config_of_one_rank_when_it_differs_in_what_is_computed_is_refused(folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(folder / "one_rank", run_dir / "checkpoints")
    num_threads = torch.get_num_threads()
    try:
        assert run(load_config(FOLDER / "run.yaml", [f"run_dir={run_dir}", "seed=8"])) == 1
    finally:
        torch.set_num_threads(num_threads)
    assert "seed: 7 in the checkpoint, 8 now" in capsys.readouterr().err


class Counter:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        raise AssertionError("nothing is saved here")

    def load_state_dict(self, state):
        assert state == {"value": state["value"], "pair": (state["value"], None)}
        self.value = state["value"]


def two_ranks_by_torch():
    """Returns parameters, Adam's state and learning rate of the run of two_ranks, all rows together."""
    rows = torch.arange(1.0, NUM_ROWS + 1)
    params = {
        "shared": nn.Parameter(torch.zeros(3)),
        "scale": nn.Parameter(torch.zeros(2)),
        "local": nn.Parameter(torch.zeros(NUM_ROWS, 2)),
    }
    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in range(4):
        params["shared"].grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1) + 0.5
        params["scale"].grad = torch.tensor([0.25, -0.75])
        params["local"].grad = torch.stack([rows, -rows * (step + 1)], 1)
        optimizer.step()
        schedule.step()
    return params, {name: optimizer.state[param] for name, param in params.items()}, schedule.get_last_lr()


def restore_two_ranks(directory):
    """One rank's body, on one rank or two: returns this rank's state after restoring."""
    backend = current()
    rows = ROWS_OF_RANK[backend.rank] if backend.world_size == 2 else list(range(NUM_ROWS))
    optimizer = distopt.optim.DistributedOptimizer(
        distopt.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    )
    norm, counter, private = nn.BatchNorm1d(2), Counter(0), Counter(0)
    with sharded_plate("rows", len(rows)):
        pyro.param("local", torch.zeros(len(rows), 2), event_dim=1)
    with Checkpointer(
        directory,
        {"optimizer": optimizer, "norm": norm, "counter": counter},
        per_rank={"own": private},
        config={"name": "two", "reduce": {"op": "average"}, "sizes": [1, 2]},
    ) as checkpointer:
        restored = checkpointer.restore()
    assert (restored.step, restored.progress, restored.world_size) == (4, {"epoch": 2}, 2)
    expected, states, last_lr = two_ranks_by_torch()
    assert local_parameters().keys() == {"local"}
    params = dict(pyro.get_param_store().named_parameters())
    assert params.keys() == expected.keys()
    optimizer_state = optimizer.get_state()
    for name, value in params.items():
        index = rows if name == "local" else slice(None)
        torch.testing.assert_close(value, nn.Parameter(expected[name].detach()[index]), rtol=1e-5, atol=1e-6)
        state = states[name] | {key: states[name][key][index] for key in ("exp_avg", "exp_avg_sq")}
        assert_adam_state(optimizer_state[name]["optimizer"], state)
        assert optimizer_state[name]["optimizer"]["param_groups"][0]["lr"] == last_lr[0] == 0.1 * 0.5**4
        assert optimizer_state[name]["scheduler"]["last_epoch"] == 4
    torch.testing.assert_close(gather_local("local")["local"], expected["local"].detach(), rtol=1e-5, atol=1e-6)

    # Four batches whose columns have means 2 and 5 and variances 2 and 18, times 1 or 2 by rank.
    kept, factor = 0.9**4, backend.rank + 1
    torch.testing.assert_close(norm.running_mean, (1 - kept) * factor * torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(norm.running_var, kept + (1 - kept) * factor**2 * torch.tensor([2.0, 18.0]))
    assert norm.num_batches_tracked == 4
    assert counter.value == 5
    assert private.value == (backend.rank + 10 if backend.world_size == 2 else 0)
    assert_rng_is_seeded(seed_of(7, 4, backend.rank))


def test_run_of_two_ranks_when_restored_on_two_has_the_numbers_of_plain_torch(folder):
    workers.world("torch_dist", 2).run(restore_two_ranks, str(folder / "two_ranks"))


def test_run_of_two_ranks_when_restored_on_one_has_all_rows(folder):
    restore_two_ranks(str(folder / "two_ranks"))


def test_config_of_a_user_is_compared_in_full(folder):
    config = {"name": "two", "reduce": {"op": "average"}, "sizes": [1, 2]}
    with Checkpointer(folder / "two_ranks", backend=Single(), config=config | {"sizes": [1, 3]}) as checkpointer:
        with pytest.raises(ConfigMismatchError, match=r"sizes: \[1, 2\] in the checkpoint, \[1, 3\] now"):
            checkpointer.restore()


def restore_compressed(directory):
    """One rank's body: returns the parameter, and this rank's error of each compressed gradient."""
    weights = pyro.param("weights", torch.zeros(12, 10)).unconstrained()
    optimizer = distopt.optim.DistributedOptimizer(
        distopt.optim.SGD({"lr": 1.0}), reduce=distopt.optim.ReduceOptions(compression="powersgd")
    )
    with Checkpointer(directory, {"optimizer": optimizer}) as checkpointer:
        assert checkpointer.restore().step == 3
    return weights.detach().numpy(), optimizer.rank_local_state.state_dict()["errors"]["weights"].numpy()


def test_errors_of_compressed_gradients_when_restored_are_what_the_parameter_lacks(folder):
    ranks = workers.world("torch_dist", 2).run(restore_compressed, str(folder / "compressed"))
    # What has not been stepped by is in the errors: with a learning rate of 1, parameter plus error is the sum of all
    # gradients, each averaged over the ranks.
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    whole = sum(torch.randn(12, 10, generator=each) for each in generators for _ in range(3)) / 2
    assert np.array_equal(ranks[0][0], ranks[1][0])
    assert not np.array_equal(ranks[0][1], ranks[1][1])
    error = (ranks[0][1] + ranks[1][1]) / 2
    torch.testing.assert_close(torch.from_numpy(error - ranks[0][0]), whole, rtol=1e-5, atol=1e-5)


def test_commands_read_format_3(folder, tmp_path):
    shown = command("inspect", folder / "one_rank", "--tensors")
    assert shown.exit_code == 0, shown.output
    for line in ("step 3, 1 rank(s)", "name: Adam", "packed/F32: F32"):
        assert line in shown.output
    for name in ("one_rank", "two_ranks", "compressed"):
        whole = command("verify", folder / name)
        assert whole.exit_code == 0 and whole.output.count("whole") == 1, whole.output
    assert export_params(folder / "two_ranks", tmp_path / "params.pt") == 2  # the third lies on its ranks
    assert export_optimizer(folder / "one_rank", tmp_path / "optim.pt") == 3
    pyro.get_param_store().load(tmp_path / "params.pt")
    expected, _, _ = two_ranks_by_torch()
    torch.testing.assert_close(pyro.param("scale").detach(), expected["scale"].detach().exp())
    module = command("export", folder / "one_rank", tmp_path / "model.pt", "--what", "module", "--name", "model")
    assert module.exit_code == 0, module.output
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert loaded.keys() == {"line.weight", "line.bias", "num_rows_seen"}
    torch.testing.assert_close(loaded["line.weight"], line_by_torch(3)[0]["line$$$weight"].detach())

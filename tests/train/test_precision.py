"""What a configuration says about precision, accumulation, particles, shards and device, against loops by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import distopt
from distopt.config import ConfigError, load_config
from distopt.data import GlobalBatches, ShardBatches, shard_rows
from distopt.infer import sharded_plate
from distopt.rng import seed_all
from distopt.run_files import read_metrics
from tests.train.runs import config, launch_well, parameters, run_here

STEPS = 6
BATCH = 100


class Network(nn.Module):
    """Regression by a network: the products of its matrices are what autocast computes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
            self.x = torch.randn(400, 3)
        self.y = self.x.sum(1).tanh()

    def model(self, x: Tensor, y: Tensor) -> None:
        pyro.module("layers", self.layers)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", self.rows(), subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(self.layers(x).squeeze(-1), scale), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("scale", dist.LogNormal(loc, 0.1))

    def rows(self) -> int:
        return len(self.x)

    def batch(self, rows: Any) -> tuple[Tensor, ...]:
        return self.x[rows], self.y[rows]


def in_bf16(fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(*args)

    return call


def by_hand(
    task: Any, batches: GlobalBatches, num_particles: int = 1, wrap: Any = lambda fn: fn, scale: float = 1.0
) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """A loop of Pyro's loss and torch's optimizer, over the same rows and noise; yields losses and parameters."""
    loss_fn = Trace_ELBO(num_particles=num_particles).differentiable_loss
    optimizer = None
    for step in range(STEPS):
        args = task.batch(batches.rows(step))
        if optimizer is None:
            seed_all(1)
            loss_fn(task.model, task.guide, *args)
            params = dict(pyro.get_param_store().named_parameters())
            optimizer = torch.optim.Adam(params.values(), lr=0.05)
        seed_all(1, step, 0)
        optimizer.zero_grad()
        loss = loss_fn(wrap(task.model), wrap(task.guide), *args)
        (scale * loss).backward()
        for param in params.values():
            param.grad /= scale
        optimizer.step()
        yield float(loss.detach()), {name: param.detach().clone() for name, param in params.items()}


def trained(tmp_path: Any, *overrides: str, task: str = "Network") -> tuple[list[float], dict[str, Tensor]]:
    path = config(
        tmp_path,
        task=f"tests.train.test_precision:{task}",
        train={"num_steps": STEPS},
        data={"global_batch": BATCH} if task == "Network" else {},
        log={"every_steps": 1, "tensorboard": False},
    )
    pyro.clear_param_store()
    run_here(path, *overrides)
    return [-row["elbo"] for row in read_metrics(tmp_path / "run")], parameters(tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "hand"),
    [
        ([], {}),
        (["train.device=cpu"], {}),
        (["train.precision=bf16"], {"wrap": in_bf16}),
        (["train.num_particles=3"], {"num_particles": 3}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_run_is_a_loop_by_hand(tmp_path, overrides, hand) -> None:
    losses, params = trained(tmp_path, *overrides)
    pyro.clear_param_store()
    *_, (_, expected_params) = expected = list(by_hand(Network(), GlobalBatches(400, BATCH, 1), **hand))
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert all(value.dtype == torch.float32 for value in params.values())
    for name, value in expected_params.items():
        torch.testing.assert_close(params[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_is_another_result_than_32_bits_and_near_it(tmp_path) -> None:
    exact, _ = trained(tmp_path, f"run_dir={tmp_path / 'run'}")
    (tmp_path / "bf16").mkdir()
    cast, _ = trained(tmp_path / "bf16", "train.precision=bf16")
    assert exact != cast and cast == pytest.approx(exact, rel=0.02)


@pytest.mark.slow
def test_fp16_scales_the_loss_and_resumes_with_its_scale(tmp_path) -> None:
    losses, params = trained(tmp_path, "train.precision=fp16", "train.num_steps=60", "checkpoint.every_steps=30")
    assert losses[-1] < losses[0] and torch.stack([value.isfinite().all() for value in params.values()]).all()
    again = tmp_path / "again"
    again.mkdir()
    trained(again, "train.precision=fp16", "train.num_steps=30", "checkpoint.every_steps=30")
    _, resumed = trained(again, "train.precision=fp16", "train.num_steps=60", "checkpoint.every_steps=30")
    for name, value in params.items():
        assert value.equal(resumed[name]), name


def test_gradients_of_several_batches_are_added_up_as_by_hand(tmp_path) -> None:
    _, params = trained(tmp_path, "reduce.backward_passes_per_step=2", "optim.name=SGD", "optim.args={lr: 1.0e-5}")
    pyro.clear_param_store()
    task, batches = Network(), GlobalBatches(400, BATCH, 1)
    loss_fn = Trace_ELBO().differentiable_loss
    seed_all(1)
    loss_fn(task.model, task.guide, *task.batch(batches.rows(0)))
    expected = dict(pyro.get_param_store().named_parameters())
    optimizer = torch.optim.SGD(expected.values(), lr=1e-5)
    for step in range(STEPS):
        seed_all(1, step, 0)
        loss_fn(task.model, task.guide, *task.batch(batches.rows(step))).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value.detach(), rtol=1e-5, atol=1e-6)


class Cells:
    """A latent variable for each datapoint, of which a step reads some."""

    sharded = True

    def __init__(self) -> None:
        self.x = torch.linspace(-3.0, 5.0, 11)

    def rows(self) -> int:
        return len(self.x)

    def shard(self) -> Any:
        worker = distopt.backends.current()
        return shard_rows(self.rows(), worker.rank, worker.world_size)

    def batch(self, rows: Any) -> tuple[Tensor, ...]:
        return torch.from_numpy(rows - self.shard()[0]), self.x[rows]

    def plate(self, index: Tensor) -> Any:
        return sharded_plate("cells", len(self.shard()), subsample=index, rows=self.shard())

    def model(self, index: Tensor, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with self.plate(index):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, index: Tensor, x: Tensor) -> None:
        pyro.sample("mean", dist.Delta(pyro.param("loc", torch.tensor(0.3))))
        with self.plate(index):
            z = pyro.param("z_loc", lambda: torch.zeros(len(self.shard())), event_dim=0)
            pyro.sample("z", dist.Delta(z))


class WholeCells(Cells):
    """The same by plates of Pyro."""

    def plate(self, index: Tensor) -> Any:
        return pyro.plate("cells", self.rows(), subsample=index)

    def shard(self) -> Any:
        return shard_rows(self.rows(), 0, 1)


def test_minibatches_of_a_shard_are_a_loop_by_hand(tmp_path) -> None:
    losses, params = trained(tmp_path, "data.shard_fraction=0.4", task="Cells")
    pyro.clear_param_store()
    batches = ShardBatches(11, 0.4, 1)
    assert {len(batches.rows(step)) for step in range(STEPS)} == {4}
    expected = list(by_hand(WholeCells(), batches))
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    torch.testing.assert_close(params["loc"], expected[-1][1]["loc"])


@pytest.mark.slow
def test_minibatches_of_shards_on_two_workers_find_every_latent_variable(tmp_path) -> None:
    path = config(
        tmp_path,
        task="tests.train.test_precision:Cells",
        train={"num_steps": 600},
        data={"shard_fraction": 0.4},
        log={"tensorboard": False},
    )
    launch_well(path)
    run = distopt.load_run(tmp_path / "run")
    # The posterior's mode, in closed form: z = (mean + 4 x) / 5 given the mean, and mean from all x.
    mean = float(run.params["loc"])
    torch.testing.assert_close(run.params["z_loc"], (mean + 4 * run.task.x) / 5, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp8"], "train.precision: .*fp8"),
        (["train.precision=bf16", "train.capture=graph"], "found train.precision bf16 and train.capture graph"),
        (["train.precision=fp16", "optim.nonfinite=raise"], "expected skip: the scale of the loss"),
        (["train.precision=bf16", "train.loss=JitTrace_ELBO"], "torch.jit casts nothing"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_a_process_starts(tmp_path, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config(tmp_path), overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.shard_fraction=0.5"], "data.shard_fraction: tests.train.tasks:Line is not sharded"),
        (["train.device=cuda"], "train.device: found cuda, but torch"),
    ],
)
def test_what_only_the_workers_see_is_refused_before_the_first_step(tmp_path, overrides, message, capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run_here(config(tmp_path), *overrides, status=1)
    assert message in capsys.readouterr().err

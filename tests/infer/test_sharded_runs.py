"""Workers with unequal shards end where one Pyro process with all data ends; runs are free of noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.distributions import constraints

from distopt import backends, optim
from distopt.checkpoint import Checkpointer, CheckpointError
from distopt.infer import shard, sharded_plate
from distopt.reduce import DisagreementError
from tests.infer.sharded_costs import NUM_DIMS, train
from tests.infer.sharded_models import float64, parameters_of_all
from tests.workers import world

DATA = torch.linspace(-2.0, 3.0, 23, dtype=torch.float64)
CUTS = {1: [], 2: [5], 3: [4, 19], 4: [2, 3, 15]}
PRIOR, SPREAD, SCALE = 2.0, 0.7, 0.5


def shard_of(rank: int, world_size: int) -> Tensor:
    """The datapoints of a rank: shards of very different sizes."""
    return torch.tensor_split(DATA, CUTS[world_size])[rank]


class _FixedDraws(dist.Normal):
    """Draws `loc + scale * sign` for four particles, so that the mean of a quadratic function over them is exact."""

    signs: tuple[float, ...]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        signs = torch.tensor(self.signs).reshape(-1, *[1] * (len(shape) - 1))
        return self.loc + self.scale * signs.expand(shape)


class _First(_FixedDraws):
    signs = (1.0, 1.0, -1.0, -1.0)


class _Second(_FixedDraws):
    signs = (1.0, -1.0, 1.0, -1.0)


def normal_normal(x: Tensor, plate: Any = pyro.plate) -> None:
    """x ~ Normal(z, SCALE), z ~ Normal(mu, SPREAD), mu ~ Normal(0, PRIOR): its posterior is a normal one."""
    mu = pyro.sample("mu", dist.Normal(0.0, PRIOR))
    with plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(mu, SPREAD))
        pyro.sample("x", dist.Normal(z, SCALE), obs=x)


def normal_guide(x: Tensor, plate: Any = pyro.plate) -> None:
    """A normal of its own for each, drawn without noise."""
    positive = constraints.positive
    loc, scale = pyro.param("mu_loc", torch.tensor(0.3)), pyro.param("mu_scale", torch.tensor(0.5), constraint=positive)
    pyro.sample("mu", _First(loc, scale))
    with plate("rows", len(x), dim=-1):
        loc = pyro.param("z_loc", lambda: torch.zeros(len(x)), event_dim=0)
        scale = pyro.param("z_scale", lambda: torch.full((len(x),), 0.5), constraint=positive, event_dim=0)
        pyro.sample("z", _Second(loc, scale))


def normal_posterior() -> dict[str, Tensor]:
    """The best guide of independent normals: the posterior's means, and one over the root of its precisions."""
    size = len(DATA)
    precision = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    precision[0, 0] = PRIOR**-2 + size * SPREAD**-2
    precision[0, 1:] = precision[1:, 0] = -(SPREAD**-2)
    precision[range(1, size + 1), range(1, size + 1)] = SPREAD**-2 + SCALE**-2
    mean = torch.linalg.solve(precision, torch.cat([torch.zeros(1, dtype=torch.float64), DATA * SCALE**-2]))
    scale = precision.diagonal().rsqrt()
    return {"mu_loc": mean[0], "mu_scale": scale[0], "z_loc": mean[1:], "z_scale": scale[1:]}


@config_enumerate
def mixture(x: Tensor, plate: Any = pyro.plate) -> None:
    """Three clusters, a spread of its own for each datapoint, the membership summed out."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("clusters", 3):
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
    with plate("rows", len(x)):
        spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
        cluster = pyro.sample("cluster", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(centre[cluster], spread), obs=x)


def _start(site: dict[str, Any]) -> Tensor:
    values = {"weights": torch.tensor([0.3, 0.5, 0.2]), "centre": torch.tensor([-1.0, 0.3, 1.5])}
    return values.get(site["name"], torch.full(site["fn"].shape(), 0.8))


def _delta(model: Callable[..., Any]) -> Any:
    return AutoDelta(poutine.block(model, hide=["cluster"]), init_loc_fn=_start)


@dataclass
class Case:
    """A model, how to make its guide, its loss."""

    model: Callable[..., Any]
    make_guide: Callable[[Any], Any]
    loss: Callable[[], Any]


CASES = {
    "normal": Case(normal_normal, lambda model: normal_guide, lambda: Trace_ELBO(4, 1, vectorize_particles=True)),
    "mixture": Case(mixture, _delta, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
}
OPTIMIZERS: dict[str, tuple[Any, ...]] = {
    "Adam": ("Adam", {"lr": 0.05}),
    "SGD": ("SGD", {"lr": 0.01, "momentum": 0.5}),
    "to the end": ("ClippedAdam", {"lr": 0.2, "lrd": 0.985}),
    "SGD, a third of its rate": ("SGD", {"lr": 0.01 / 3, "momentum": 0.5}),
    "clipped": ("SGD", {"lr": 0.05}, {"global_norm": 20.0}),
}


def train_in_pyro(case: str, optimizer: str, num_steps: int) -> tuple[dict[str, Tensor], float]:
    """Returns the parameters and the last loss of Pyro alone, with all data."""
    with float64():
        pyro.clear_param_store()
        kind, args = OPTIMIZERS[optimizer]
        chosen = CASES[case]
        svi = SVI(chosen.model, chosen.make_guide(chosen.model), getattr(pyro.optim, kind)(args), chosen.loss())
        loss = 0.0
        for _ in range(num_steps):
            loss = svi.step(DATA)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, float(loss)


def sharded_svi(case: str, optimizer: str, op: str = "average") -> tuple[SVI, Tensor]:
    """Returns this rank's SVI and datapoints; `normal` by `sharded_plate`, `mixture` by `shard`."""
    backend = backends.current()
    kind, *args = OPTIMIZERS[optimizer]
    chosen = CASES[case]
    if case == "normal":
        model, guide = (lambda x: normal_normal(x, sharded_plate)), (lambda x: normal_guide(x, sharded_plate))
    else:
        model = shard(chosen.model, "rows")
        guide = shard(chosen.make_guide(model), "rows")
    distributed = optim.DistributedOptimizer(getattr(optim, kind)(*args), reduce=optim.ReduceOptions(op=op))
    return SVI(model, guide, distributed, chosen.loss()), shard_of(backend.rank, backend.world_size)


def _run_shard(case: str, optimizer: str, num_steps: int, op: str = "average") -> tuple[dict[str, Any], float]:
    """One rank's part of `train_in_pyro`; returns the same, as arrays."""
    with float64():
        svi, data = sharded_svi(case, optimizer, op)
        return _go_on(svi, data, num_steps)


def _run_and_save(case: str, directory: str, num_steps: int, num_more: int) -> tuple[dict[str, Any], float]:
    """One rank's part of a run that saves after `num_steps` and goes on for `num_more`; returns as `_run_shard`."""
    with float64():
        svi, data = sharded_svi(case, "Adam")
        for _ in range(num_steps):
            svi.step(data)
        with Checkpointer(directory, {"optimizer": svi.optim}) as checkpointer:
            checkpointer.save(num_steps)
            checkpointer.wait()
        return _go_on(svi, data, num_more)


def _run_resumed(case: str, directory: str, num_more: int) -> tuple[dict[str, Any], float]:
    """One rank's part of a run that goes on from there, on any number of ranks."""
    with float64():
        svi, data = sharded_svi(case, "Adam")
        with Checkpointer(directory, {"optimizer": svi.optim}) as checkpointer:
            try:
                checkpointer.restore()
                raise AssertionError("restored before it was known which datapoints are here")
            except CheckpointError as error:
                assert "svi.init" in str(error), error
            svi.loss(svi.model, svi.guide, data)
            assert checkpointer.restore() is not None
        return _go_on(svi, data, num_more)


def _go_on(svi: SVI, data: Tensor, num_steps: int) -> tuple[dict[str, Any], float]:
    loss = 0.0
    for _ in range(num_steps):
        loss = svi.step(data)
    losses = backends.current().all_gather_json(loss)
    return {name: value.numpy() for name, value in parameters_of_all().items()}, sum(losses) / len(losses)


MAX_NORM = 20.0


def clip_in_torch(num_steps: int) -> dict[str, Tensor]:
    """Returns the parameters of Pyro's gradients, all data, clipped and stepped by torch alone."""
    with float64():
        pyro.clear_param_store()
        chosen, store = CASES["normal"], pyro.get_param_store()
        chosen.loss().loss(chosen.model, normal_guide, DATA)
        params = [param for _, param in store.named_parameters()]
        sgd, norms = torch.optim.SGD(params, lr=0.05), []
        for _ in range(num_steps):
            sgd.zero_grad()
            chosen.loss().loss_and_grads(chosen.model, normal_guide, DATA)
            norms.append(float(torch.nn.utils.clip_grad_norm_(params, MAX_NORM)))
            sgd.step()
        assert max(norms) > MAX_NORM > min(norms), "some steps are clipped and some are not"
        return {name: value.detach().clone() for name, value in store.items()}


def _run_clipped(num_steps: int) -> dict[str, Any]:
    """One rank's part of `clip_in_torch`."""
    with float64():
        svi, data = sharded_svi("normal", "clipped")
        return _go_on(svi, data, num_steps)[0]


def _run_overflow() -> tuple[float, float, list[float]]:
    """Returns the scale, the replicated and this rank's own values after rank 0's own gradient overflowed once."""
    rank = backends.current().rank
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = optim.DistributedOptimizer(optim.SGD({"lr": 1.0}, scaler=scaler))
    shared = pyro.param("shared", torch.zeros(())).unconstrained()
    with sharded_plate("rows", rank + 2):
        local = pyro.param("own", torch.zeros(rank + 2), event_dim=0).unconstrained()
    for step in range(3):
        scale = float(scaler.scale(torch.ones(())))
        shared.grad = torch.tensor(scale)
        local.grad = torch.full(
            (rank + 2,), torch.inf if rank == 0 and step == 1 else scale * backends.current().world_size
        )
        optimizer([shared, local])
    return scaler.get_scale(), float(shared), local.tolist()


def _run_disagreement(kind: str) -> str:
    """Returns what this rank is told of a parameter that is local on rank 0 alone, or clipped by a callable."""
    data = DATA[:4]

    def guide(x: Tensor) -> None:
        with sharded_plate("rows", len(x), replicated=["z_loc"]):
            is_local = kind == "clip" or backends.current().rank == 0
            loc = pyro.param("z_loc", lambda: torch.zeros(len(x)), event_dim=0 if is_local else None)
            pyro.sample("z", dist.Normal(loc, 1.0))

    def model(x: Tensor) -> None:
        with sharded_plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    clip: Any = (lambda name: {"global_norm": 1.0}) if kind == "clip" else {}
    svi = SVI(model, guide, optim.DistributedOptimizer(optim.SGD({"lr": 0.1}, clip)), Trace_ELBO())
    try:
        svi.step(data.float())
    except (DisagreementError, ValueError) as error:
        return str(error)
    return "no error"


SLOW = pytest.mark.slow


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        pytest.param("torch_dist", 1, marks=SLOW),
        ("torch_dist", 2),
        pytest.param("torch_dist", 3, marks=SLOW),
        pytest.param("torch_dist", 4, marks=SLOW),
        ("horovod", 2),
    ],
)
@pytest.mark.parametrize("optimizer", ["Adam", pytest.param("SGD", marks=SLOW)])
@pytest.mark.parametrize("case", ["normal", "mixture"])
def test_parameters_after_100_steps_are_those_of_one_pyro_process(
    case: str, optimizer: str, kind: str, world_size: int
) -> None:
    expected, expected_loss = train_in_pyro(case, optimizer, 100)
    for actual, loss in world(kind, world_size).run(_run_shard, case, optimizer, 100):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        assert loss == pytest.approx(expected_loss, rel=1e-9)


def test_sum_over_ranks_scales_shared_and_local_gradients_alike() -> None:
    expected, _ = train_in_pyro("normal", "SGD", 100)
    for actual, _ in world("torch_dist", 3).run(_run_shard, "normal", "SGD, a third of its rate", 100, "sum"):
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_training_ends_at_the_closed_form_posterior() -> None:
    actual, _ = world("torch_dist", 3).run(_run_shard, "normal", "to the end", 700)[1]
    for name, value in normal_posterior().items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("case", ["normal", "mixture"])
def test_run_of_four_workers_goes_on_from_its_checkpoint_on_two_and_on_three(case: str, tmp_path: Path) -> None:
    expected, expected_loss = train_in_pyro(case, "Adam", 60)
    ways = [
        world("torch_dist", 4).run(_run_and_save, case, str(tmp_path), 40, 20),
        world("torch_dist", 2).run(_run_resumed, case, str(tmp_path), 20),
        world("torch_dist", 3).run(_run_resumed, case, str(tmp_path), 20),
    ]
    for actual, loss in (each for way in ways for each in way):
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
        assert loss == pytest.approx(expected_loss, rel=1e-9)


@pytest.mark.slow
def test_memory_falls_with_the_number_of_workers_and_bytes_sent_do_not_grow_with_the_rows() -> None:
    num_rows, alone = 1_000_000, 0
    for world_size in (1, 2, 3, 4):
        few = world("torch_dist", world_size).run(train, 1000, 2)  # also loads what a first step loads
        workers = world("torch_dist", world_size).run(train, num_rows, 2)
        if world_size > 1 and max(worker["peak"] for worker in workers) > 1.15 * alone / world_size:
            # What else the system brings into memory only adds.
            workers = world("torch_dist", world_size).run(train, num_rows, 2)
        assert sum(worker["rows"] for worker in workers) == num_rows
        if world_size == 1:
            alone = workers[0]["peak"]
            assert alone > 4 * num_rows * NUM_DIMS * 4  # values, gradients, Adam's two moments: the measure sees them
        for worker in workers:
            assert worker["peak"] == pytest.approx(alone / world_size, rel=0.15)
            assert worker["calls"] == (world_size > 1)  # a rank that is alone has nobody to ask
            assert worker["bytes"] == few[0]["bytes"] < 1000


def test_parameter_that_is_local_on_one_rank_alone_is_named_on_all() -> None:
    for messages in world("torch_dist", 2).run(_run_disagreement, "kind"):
        assert "'z_loc' differs in kind: rank 0: local; rank 1: replicated" in messages


def test_global_norm_is_over_the_parameters_of_all_ranks_as_torch_clips_those_of_one_process() -> None:
    expected = clip_in_torch(40)
    for actual in world("torch_dist", 3).run(_run_clipped, 40):
        for name, value in expected.items():
            np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_global_norm_of_a_callable_is_refused_where_ranks_cannot_tell_over_which_parameters_it_goes() -> None:
    for messages in world("torch_dist", 2).run(_run_disagreement, "clip"):
        assert "gives global_norm for 'z_loc', a parameter of one rank alone" in messages


def test_overflow_of_one_ranks_own_gradient_makes_all_skip_the_step_and_lower_their_scale() -> None:
    for rank, (scale, shared, local) in enumerate(world("torch_dist", 2).run(_run_overflow)):
        assert (scale, shared, local) == (4.0, -2.0, [-2.0] * (rank + 2))

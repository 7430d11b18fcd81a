"""Stopping at any step and going on equals never having stopped, bit for bit on the CPU, on one rank and on two."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal

import distopt.optim
from distopt.backends import current
from distopt.checkpoint import Checkpointer, Retention
from tests import workers

STEPS, LATE = 12, 99
ROWS = 60
X = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(5))
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(ROWS, generator=torch.Generator().manual_seed(6))


def model(x, y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", ROWS, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ weights, scale), obs=y)


def adam():
    return pyro.optim.Adam({"lr": 0.05})


def clipped_adam():
    return pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})


def momentum():
    return pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9}, {"clip_norm": 5.0})


def exponential():
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9})


def plateau():
    args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "patience": 1, "factor": 0.5}
    return pyro.optim.ReduceLROnPlateau(args)


def packed_adam():
    return distopt.optim.Adam({"lr": 0.05})


def packed_exponential():
    args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}
    return distopt.optim.ExponentialLR(args, {"clip_norm": 50.0})


MAKERS = (adam, clipped_adam, momentum, exponential, plateau, packed_adam, packed_exponential)
OPTIMIZERS = {maker.__name__: maker for maker in MAKERS}


class Averaged(pyro.optim.PyroOptim):
    """Averages gradients over ranks, as plainly as can be, so that the test depends on the checkpoint alone."""

    def __init__(self, inner):
        super().__init__(torch.optim.SGD, {})
        self.inner = inner

    def __call__(self, params, *args, **kwargs):
        backend = current()
        params = sorted(params, key=pyro.get_param_store().param_name)
        for param in params:
            backend.all_reduce(param.grad).wait()
            param.grad /= backend.world_size
        self.inner(params, *args, **kwargs)


class Losses:
    """What each rank has for itself."""

    def __init__(self):
        self.values = []

    def state_dict(self):
        return {"values": list(self.values)}

    def load_state_dict(self, state):
        self.values[:] = state["values"]


def mean(loss):
    """Over all ranks: a schedule that hears of each rank's own would part them."""
    return sum(current().all_gather_json(loss)) / current().world_size


def train(name, directory, *, stop=STEPS, saves=(), resume="never", rank=0, world_size=1):
    """Trains from a fresh start or a checkpoint up to step `stop`; returns a digest of all state and the losses."""
    pyro.clear_param_store()
    pyro.set_rng_seed(100)
    optimizer = OPTIMIZERS[name]()
    guide = (AutoNormal if name != "momentum" else AutoLowRankMultivariateNormal)(model)
    if world_size > 1:
        guide(X[:20], Y[:20])  # alike on all ranks, though it draws
        pyro.set_rng_seed(100 + rank)
    svi = SVI(model, guide, Averaged(optimizer) if world_size > 1 else optimizer, Trace_ELBO(num_particles=2))
    history = Losses()
    losses = history.values
    state = {"optimizer": optimizer, "guide": guide}
    with Checkpointer(directory, state, per_rank={"losses": history}, keep=Retention(100)) as checkpointer:
        restored = checkpointer.restore(resume)
        step = restored.step if restored else 0
        while step < stop:
            rows = torch.randperm(ROWS)[:20]
            losses.append(svi.step(X[rows], Y[rows]))
            step += 1
            if step % 3 == 0 and hasattr(optimizer, "step"):
                optimizer.step(mean(losses[-1])) if name == "plateau" else optimizer.step()
            if step in saves:
                checkpointer.save(step)
        checkpointer.wait()
    return losses, digest(optimizer)


def digest(optimizer):
    observed = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            observed.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                observed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            observed.update(repr(value).encode())

    add(dict(pyro.get_param_store().named_parameters()))
    add(optimizer.get_state())
    add(torch.rand(3))
    return observed.hexdigest()


def stop_and_resume(name, directory, stops, **here):
    """Returns what undisturbed runs end with, and the same runs stopped at each of `stops` and resumed."""
    whole, resumed = [], []
    for stop in stops:
        end = STEPS if stop < STEPS else stop + 3
        if stop in (stops[0], LATE):  # the early ones share their undisturbed run
            whole.append(train(name, directory / f"whole-{end}", stop=end, **here))
        else:
            whole.append(whole[-1])
        train(name, directory / f"stopped-{stop}", stop=stop, saves=(stop,), **here)
        resumed.append(train(name, directory / f"stopped-{stop}", stop=end, resume="auto", **here))
    return whole, resumed


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_on_one_rank_when_stopped_and_resumed_equals_the_undisturbed_run(name, tmp_path):
    whole, resumed = stop_and_resume(name, tmp_path, (1, 10, LATE))
    assert resumed == whole


@pytest.mark.slow
def test_run_when_resumed_from_any_of_its_steps_equals_the_undisturbed_run(tmp_path):
    reference = train("packed_exponential", tmp_path, saves=range(1, STEPS))
    for step in range(1, STEPS):
        assert train("packed_exponential", tmp_path, resume=step) == reference


def _stop_and_resume(directory, names, stops):
    here = {"rank": current().rank, "world_size": current().world_size}
    return {name: stop_and_resume(name, Path(directory, name), stops, **here) for name in names}


ALL = list(OPTIMIZERS)


@pytest.mark.parametrize(
    ("kind", "size", "names", "stops"),
    [
        pytest.param("torch_dist", 2, ALL, (1, 10), marks=pytest.mark.slow),
        ("torch_dist", 2, ["exponential", "packed_adam"], (LATE,)),
        ("horovod", 2, ["exponential", "plateau", "packed_exponential"], (7,)),
        pytest.param("torch_dist", 4, ["exponential", "packed_adam"], (10,), marks=pytest.mark.slow),
        pytest.param("torch_dist", 2, ALL, (LATE,), marks=pytest.mark.slow),
        pytest.param("torch_dist", 4, ALL, (1, 10, LATE), marks=pytest.mark.slow),
        pytest.param("horovod", 2, ALL, (1, 10, LATE), marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(600)
def test_run_on_several_ranks_when_stopped_and_resumed_equals_the_undisturbed_run(kind, size, names, stops, tmp_path):
    ranks = workers.world(kind, size).run(_stop_and_resume, str(tmp_path), names, stops, timeout_s=500)
    for observed in ranks:
        for name, (whole, resumed) in observed.items():
            assert resumed == whole, name
    losses = [observed["exponential"][0][0][0] for observed in ranks]
    assert all(losses[0] != other for other in losses[1:])  # each rank has noise and rows of its own


def _stop_here(directory):
    here = {"rank": current().rank, "world_size": current().world_size}
    train("packed_exponential", Path(directory, "run"), stop=7, saves=(7,), **here)
    return train("packed_exponential", Path(directory, "whole"), **here)


def _resume_here(directory):
    here = {"rank": current().rank, "world_size": current().world_size}
    return train("packed_exponential", Path(directory, "run"), resume="auto", **here)


def test_run_when_resumed_over_another_backend_equals_the_undisturbed_run(tmp_path):
    whole = workers.world("torch_dist", 2).run(_stop_here, str(tmp_path))
    assert workers.world("horovod", 2).run(_resume_here, str(tmp_path)) == whole  # two terms have one sum


def train_compressed(directory, stop, resume="never", undone=0):
    """Trains a matrix whose gradients cross as PowerSGD's, with each rank's own error feedback; returns all that is."""
    pyro.clear_param_store()
    backend = current()
    generator = torch.Generator().manual_seed(backend.rank)
    gradients = [torch.randn(12, 10, generator=generator) for _ in range(stop)]
    weights = pyro.param("weights", torch.zeros(12, 10)).unconstrained()
    optimizer = distopt.optim.DistributedOptimizer(
        packed_adam(), reduce=distopt.optim.ReduceOptions(compression="powersgd")
    )
    with Checkpointer(directory, {"optimizer": optimizer}, keep=Retention(9)) as checkpointer:
        for gradient in gradients[:undone]:
            weights.grad = gradient.clone()
            optimizer([weights])
        restored = checkpointer.restore(resume)
        for step in range(0 if restored is None else restored.step, stop):
            weights.grad = gradients[step].clone()
            optimizer([weights])
            checkpointer.save(step + 1)
        checkpointer.wait()
    return weights.tolist(), digest(optimizer.optim)


@pytest.mark.parametrize("undone", [0, 4], ids=["new_process", "rolled_back"])
def test_run_with_lossy_compression_when_resumed_goes_on_with_each_ranks_own_errors(undone, tmp_path):
    world = workers.world("torch_dist", 2)
    whole = world.run(train_compressed, str(tmp_path), 5)
    assert world.run(train_compressed, str(tmp_path), 5, 2, undone) == whole


def test_parameters_when_restored_are_packed_again_by_the_optimizer(tmp_path):
    def step(optimizer):
        params = [value for _, value in pyro.get_param_store().named_parameters()]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer(params)
        return sorted((param.data_ptr(), param.numel() * param.element_size()) for param in params)

    for size in (1, 7, 20_000):  # the last one has an entry of its own in the file
        pyro.param(f"x{size}", torch.zeros(size))
    optimizer = packed_adam()
    step(optimizer)
    with Checkpointer(tmp_path, {"optimizer": optimizer}) as checkpointer:
        checkpointer.save(1)
    pyro.clear_param_store()
    optimizer = packed_adam()
    with Checkpointer(tmp_path, {"optimizer": optimizer}) as checkpointer:
        checkpointer.restore()
    for (address, size), (following, _) in pairwise(step(optimizer)):
        assert following == address + size  # side by side in one buffer


@pytest.mark.parametrize("name", ["exponential", "packed_exponential"])
def test_rolling_back_in_a_running_process_equals_having_gone_on_from_there(name, tmp_path):
    reference = train(name, tmp_path / "whole")
    pyro.clear_param_store()
    pyro.set_rng_seed(100)
    optimizer = OPTIMIZERS[name]()
    guide = AutoNormal(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=2))
    with Checkpointer(tmp_path / "rolled", {"optimizer": optimizer, "guide": guide}) as checkpointer:
        losses = []
        for attempt in range(2):
            for step in range(4 if attempt else 0, STEPS):
                rows = torch.randperm(ROWS)[:20]
                losses[step:] = [svi.step(X[rows], Y[rows])]
                if (step + 1) % 3 == 0:
                    optimizer.step()
                if step + 1 == 4:
                    checkpointer.save(4)
            if not attempt:
                checkpointer.restore(4)
    assert (losses, digest(optimizer)) == reference

"""Stopping at any step and going on equals never having stopped, bit for bit on the CPU, on one rank and on two."""

from __future__ import annotations

import hashlib
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
from distopt.checkpoint import Checkpointer
from tests import workers

STEPS = 12
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


def train(name, directory, *, stop=STEPS, saves=(), resume=False, rank=0, world_size=1):
    """Trains from a fresh start or a checkpoint up to step `stop`; returns a digest of all state and the losses."""
    pyro.clear_param_store()
    pyro.set_rng_seed(100 + rank)
    optimizer = OPTIMIZERS[name]()
    guide = (AutoNormal if name != "momentum" else AutoLowRankMultivariateNormal)(model)
    svi = SVI(model, guide, Averaged(optimizer) if world_size > 1 else optimizer, Trace_ELBO(num_particles=2))
    history = Losses()
    losses = history.values
    keep = {"modules": {"guide": guide}, "rank_extras": {"losses": history}, "keep_last": 100}
    with Checkpointer(directory, optimizer=optimizer, **keep) as checkpointer:
        step = checkpointer.restore().step if resume else 0
        while step < stop:
            rows = torch.randperm(ROWS)[:20]
            losses.append(svi.step(X[rows], Y[rows]))
            step += 1
            if step % 3 == 0 and hasattr(optimizer, "step"):
                optimizer.step(losses[-1]) if name == "plateau" else optimizer.step()
            if step in saves:
                checkpointer.save(step)
        checkpointer.wait()
    return losses, digest(optimizer)


def digest(optimizer):
    found = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                found.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    add(dict(pyro.get_param_store().named_parameters()))
    add(optimizer.get_state())
    add(torch.rand(3))
    return found.hexdigest()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_on_one_rank_when_stopped_and_resumed_equals_the_undisturbed_run(name, tmp_path):
    reference = train(name, tmp_path / "whole")
    for stop in (1, 5, 11):
        directory = tmp_path / f"stopped-{stop}"
        train(name, directory, stop=stop, saves=(stop,))
        assert train(name, directory, resume=True) == reference


def _stop_and_resume(kind, directory):
    backend = current()
    here = {"rank": backend.rank, "world_size": backend.world_size}
    reference = train("exponential", Path(directory, "whole"), **here)
    results = []
    for stop in (1, 7):
        stopped = Path(directory, f"stopped-{stop}")
        train("exponential", stopped, stop=stop, saves=(stop,), **here)
        results.append(train("exponential", stopped, resume=True, **here))
    return reference, results


@pytest.mark.parametrize("kind", ["torch_dist", "horovod"])
def test_run_on_two_ranks_when_stopped_and_resumed_equals_the_undisturbed_run(kind, tmp_path):
    ranks = workers.world(kind, 2).run(_stop_and_resume, kind, str(tmp_path))
    for reference, results in ranks:
        assert results == [reference, reference]
    losses = [reference[0] for reference, _ in ranks]
    assert losses[0] != losses[1]  # each rank has noise and rows of its own


@pytest.mark.parametrize("name", ["exponential", "packed_exponential"])
def test_rolling_back_in_a_running_process_equals_having_gone_on_from_there(name, tmp_path):
    reference = train(name, tmp_path / "whole")
    pyro.clear_param_store()
    pyro.set_rng_seed(100)
    optimizer = OPTIMIZERS[name]()
    guide = AutoNormal(model)
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=2))
    with Checkpointer(tmp_path / "rolled", optimizer=optimizer, modules={"guide": guide}) as checkpointer:
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

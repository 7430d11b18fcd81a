"""A state that is not finite is neither written nor read, and rank and parameter are named."""

from __future__ import annotations

import logging
import math

import pyro
import pytest
import torch
from torch.distributions import constraints

from distopt.backends import current
from distopt.checkpoint import Checkpointer, CheckpointError, finite
from distopt.checkpoint.finite import nonfinite
from distopt.optim import Adam
from tests import workers
from tests.checkpoint.runs import checkpointer


def stepped(value=1.0, size=3, gradient=1.0, **settings):
    """A parameter and an optimizer that has stepped it once."""
    pyro.clear_param_store()
    optimizer = Adam({"lr": 0.1})
    param = pyro.param("x", torch.full((size,), value), **settings).unconstrained()
    param.grad = torch.full((size,), gradient)
    optimizer([param])
    return optimizer, param


@pytest.mark.parametrize("size", [3, 30_000], ids=["packed", "large"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["parameter", "optimizer"])
def test_state_that_is_not_finite_is_not_committed_and_named(what, number, size, tmp_path):
    optimizer, param = stepped(size=size)
    with checkpointer(tmp_path, {"optimizer": optimizer}) as keeper:
        keeper.save(1)
        keeper.wait()
        if what == "parameter":
            with torch.no_grad():
                param[1] = number
        else:
            param.grad = torch.full((size,), number)
            optimizer([param])
            with torch.no_grad():
                param.fill_(1.0)
        keeper.save(2)
        name = "parameter 'x'" if what == "parameter" else "optimizer state of 'x'"
        with pytest.raises(CheckpointError, match=rf"step 2 was NOT saved.*rank 0 of 1: {name} not finite"):
            keeper.wait()
        assert keeper.steps() == [1]


def test_save_after_one_that_was_refused_raises_its_cause(tmp_path):
    optimizer, param = stepped()
    with checkpointer(tmp_path, {"optimizer": optimizer}) as keeper:
        with torch.no_grad():
            param.fill_(math.nan)
        keeper.save(1)
        with pytest.raises(CheckpointError, match="parameter 'x' not finite"):
            keeper.save(2)
        with torch.no_grad():
            param.fill_(1.0)
        keeper.save(3)
        keeper.wait()
        assert keeper.steps() == [3]


def test_run_resumes_from_before_a_checkpoint_that_is_not_finite(tmp_path, monkeypatch, caplog):
    optimizer, param = stepped()
    with checkpointer(tmp_path, {"optimizer": optimizer}) as keeper:
        keeper.save(1)
        monkeypatch.setattr("distopt.checkpoint.background.check_snapshots", lambda *args: None)
        with torch.no_grad():
            param[0] = math.nan
        keeper.save(2)  # as an older distopt did
        keeper.wait()
        caplog.set_level(logging.ERROR)
        assert keeper.restore().step == 1
        assert "parameter 'x' not finite" in caplog.text and "Falling back" in caplog.text
        assert torch.isfinite(pyro.param("x")).all()


@pytest.mark.parametrize(
    ("value", "constraint"),
    [([0.0, 1.0], constraints.positive), ([0.0, 0.5], constraints.unit_interval), ([0.0, 1.0], constraints.simplex)],
    ids=["positive", "unit interval", "simplex"],
)
def test_value_at_the_boundary_of_its_constraint_is_saved(value, constraint, tmp_path):
    pyro.clear_param_store()
    param = pyro.get_param_store()
    pyro.param("x", torch.tensor([0.5, 0.5]), constraint=constraint)
    with torch.no_grad():
        pyro.get_param_store()._params["x"][0] = -math.inf
    with checkpointer(tmp_path) as keeper:
        keeper.save(1)
        keeper.wait()
        assert keeper.restore().step == 1
    assert 0 <= param["x"][0] < 1e-6


def test_buffers_and_frozen_parameters_may_hold_what_they_like(tmp_path):
    net = torch.nn.Linear(2, 2)
    net.register_buffer("mask", torch.full((2, 2), -math.inf))
    pyro.clear_param_store()
    pyro.get_param_store().set_state(
        {"params": {"data": torch.tensor([math.nan])}, "constraints": {"data": constraints.real}}
    )
    with checkpointer(tmp_path, {"net": net}) as keeper:
        keeper.save(1)
        keeper.wait()
        assert keeper.restore().step == 1


@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.InstanceNorm1d])
def test_running_statistics_that_are_not_finite_are_neither_committed_nor_resumed(kind, tmp_path, monkeypatch, caplog):
    shape = (4, 3) if kind is torch.nn.BatchNorm1d else (4, 3, 3)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), kind(3, track_running_stats=True))
    net(torch.ones(shape))
    with checkpointer(tmp_path, {"net": net}) as keeper:
        keeper.save(1)
        keeper.wait()
        net(torch.full(shape, math.nan))
        keeper.save(2)
        with pytest.raises(CheckpointError, match=r"rank 0 of 1: buffer '1.running_mean' of module 'net', buffer"):
            keeper.wait()
        assert keeper.steps() == [1]

    monkeypatch.setattr("distopt.checkpoint.background.check_snapshots", lambda *args: None)
    with checkpointer(tmp_path, {"net": net}) as keeper:
        keeper.save(3)  # as an older distopt did
        keeper.wait()
        caplog.set_level(logging.ERROR)
        assert keeper.restore().step == 1 and "buffer '1.running_mean' of module 'net'" in caplog.text
        assert all(torch.isfinite(each).all() for each in net.buffers())


def test_names_are_listed_up_to_a_few():
    params = {f"x{index}": {"value": torch.tensor(math.nan)} for index in range(9)}
    listed = nonfinite({"params": params, "optimizers": {}, "modules": {}})
    assert listed.count("parameter") == finite._MAX_NAMES and listed.endswith("and more")


def _save_nan_on_rank_0(directory):
    rank = current().rank
    optimizer, param = stepped()
    with Checkpointer(directory, {"optimizer": optimizer}) as keeper:
        keeper.save(1)
        keeper.wait()
        if rank == 0:
            with torch.no_grad():
                param[1] = math.nan
        keeper.save(2)
        try:
            keeper.wait()
        except CheckpointError as error:
            return str(error), keeper.steps()


def test_refusal_of_one_rank_reaches_all(tmp_path):
    for text, steps in workers.world("torch_dist", 2).run(_save_nan_on_rank_0, str(tmp_path)):
        assert "rank 0 of 2: parameter 'x' not finite" in text and steps == [1]

"""Rows that each rank holds alone are saved by global index and split anew over any number of ranks."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.optim
import pytest
import torch

from distopt.backends import current
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer, CheckpointError, Shard
from distopt.checkpoint import statefile as statefile_module
from tests import workers

NUM_ROWS = 301
DIMS = {"local": 0, "wide": 1}


def rows_of(rank, world_size):
    """Neither contiguous nor sorted."""
    return np.random.default_rng(3).permutation(NUM_ROWS)[rank::world_size].astype(np.int64)


def sharding(rank, world_size):
    rows = rows_of(rank, world_size)
    return lambda name: Shard(rows, NUM_ROWS, DIMS[name]) if name in DIMS else None


def full(name):
    values = torch.arange(NUM_ROWS * 4, dtype=torch.float32).reshape(NUM_ROWS, 4) + 1
    return values if name == "local" else values.T.contiguous() / 7


def make(rank, world_size):
    """Parameters and an optimizer whose every value tells its global row."""
    rows = torch.from_numpy(rows_of(rank, world_size))
    optimizer = pyro.optim.Adam({"lr": 0.5})
    pyro.param("everywhere", torch.arange(3.0))
    for name, dim in DIMS.items():
        pyro.param(name, full(name).index_select(dim, rows), constraint=torch.distributions.constraints.positive)
    params = [value for _, value in pyro.get_param_store().named_parameters()]
    for param in params:
        param.grad = param.detach().clone()
    optimizer(params)
    return optimizer


def state_of(optimizer):
    state = {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().named_parameters()}
    for name, entry in optimizer.get_state().items():
        for key, value in entry["state"][0].items():
            state[f"{name}/{key}"] = value.numpy().copy()
    return state


def _save(directory):
    backend = current()
    optimizer = make(backend.rank, backend.world_size)
    with Checkpointer(
        directory, optimizer=optimizer, sharded=sharding(backend.rank, backend.world_size)
    ) as checkpointer:
        checkpointer.save(1)
        checkpointer.wait()


def _restore(directory):
    backend = current()
    return restore(directory, backend, sharding(backend.rank, backend.world_size))


def restore(directory, backend, split):
    optimizer = pyro.optim.Adam({"lr": 0.5})
    with Checkpointer(directory, optimizer=optimizer, backend=backend, sharded=split) as checkpointer:
        checkpointer.restore()
    state = {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().named_parameters()}
    for name, entry in optimizer._state_waiting_to_be_consumed.items():
        for key, value in entry["state"][0].items():
            state[f"{name}/{key}"] = value.numpy().copy()
    return state


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 2])
def test_rows_when_split_over_another_number_of_ranks_are_with_those_that_hold_them(before, after, tmp_path):
    if before == 1:
        with Checkpointer(tmp_path, optimizer=make(0, 1), sharded=sharding(0, 1), backend=Single()) as checkpointer:
            checkpointer.save(1)
        pyro.clear_param_store()
    else:
        workers.world("torch_dist", 2).run(_save, str(tmp_path))
    if after == 1:
        found = [restore(tmp_path, Single(), sharding(0, 1))]
    else:
        found = workers.world("torch_dist", 2).run(_restore, str(tmp_path))
    for rank, state in enumerate(found):
        pyro.clear_param_store()
        expected = state_of(make(rank, after))
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(state[name], value, err_msg=name)


def test_rows_when_a_few_are_wanted_are_read_without_the_rest(tmp_path, monkeypatch):
    big = 400_000
    pyro.param("local", torch.arange(big * 8.0).reshape(big, 8))
    with Checkpointer(tmp_path, sharded=lambda name: Shard(np.arange(big), big), backend=Single()) as checkpointer:
        checkpointer.save(1)
    pyro.clear_param_store()
    sizes = []
    host_bytes = statefile_module.host_bytes
    monkeypatch.setattr(statefile_module, "host_bytes", lambda size, **kw: sizes.append(size) or host_bytes(size, **kw))
    wanted = np.arange(1000, 1010)
    with Checkpointer(tmp_path, sharded=lambda name: Shard(wanted, big), backend=Single()) as checkpointer:
        checkpointer.restore()
    assert torch.equal(pyro.param("local")[:, 0].detach(), torch.from_numpy(wanted).float() * 8)
    assert max(sizes) == big * 8  # the rows' indices; of 12.8 MB of values, 320 bytes


def test_row_that_nobody_saved_and_missing_sharding_are_told(tmp_path):
    with Checkpointer(tmp_path, optimizer=make(0, 2), sharded=sharding(0, 2), backend=Single()) as checkpointer:
        checkpointer.save(1)
    with (
        Checkpointer(tmp_path, sharded=sharding(1, 2), backend=Single()) as checkpointer,
        pytest.raises(CheckpointError, match="none of 1"),
    ):
        checkpointer.restore()
    with Checkpointer(tmp_path, backend=Single()) as checkpointer, pytest.raises(CheckpointError, match="none of 1"):
        checkpointer.restore()

"""Modules that the model registers are computed with: their buffers are saved, and equal on all ranks from then on."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import nn

from distopt.backends import current
from distopt.checkpoint import Checkpointer, CheckpointError
from distopt.checkpoint.module_state import RegisteredModules, check_modules
from tests import workers


def registered(*names):
    modules = {}
    for name in names:
        modules[name] = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        pyro.module(name, modules[name])
    return modules


def test_registered_modules_with_buffers_are_known_by_their_names():
    modules = registered("a", "b")
    plain = nn.Linear(2, 2)
    pyro.module("plain", plain)
    finder = RegisteredModules({"mine": modules["b"]})
    assert finder.find() == {"a": modules["a"]}
    more = registered("c")
    assert finder.find() == {"a": modules["a"], "c": more["c"]}


def test_outermost_owner_of_parameters_is_taken_once():
    outer = nn.ModuleDict({"first": nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)), "second": nn.BatchNorm1d(2)})
    pyro.module("first", outer["first"])
    pyro.module("second", outer["second"])
    assert RegisteredModules({}).find() == {"first": outer}


def test_buffers_that_a_checkpoint_lacks_are_named():
    with pytest.raises(CheckpointError, match=r"module 'net' has running_mean, running_var.*lacks.*'other'"):
        check_modules({"modules": {"other": {}}}, {}, {"net": nn.BatchNorm1d(2)})


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf))


def _align(directory):
    rank = current().rank
    net, counting, given = registered("net")["net"], Counting(), nn.BatchNorm1d(2, momentum=0.5)
    counting.mean += rank
    counting.count += 3 + rank
    with Checkpointer(directory, {"counting": counting, "given": given}) as keeper:
        for step in (1, 2):
            net(torch.full((4, 2), float(rank + step)) + torch.arange(4.0)[:, None])
            given(torch.full((4, 2), float(rank)) + torch.arange(4.0)[:, None])
            alone = given.running_mean.clone()
            keeper.save(step)
        keeper.wait()
    state = {**net.state_dict(), **counting.state_dict(), "given": given.running_mean}
    buffers = {name: value.tolist() for name, value in state.items() if not name.endswith(("weight", "bias"))}
    return buffers, alone.tolist()


def test_buffers_of_all_ranks_are_equal_from_a_save_on(tmp_path):
    (first, alone), (second, other) = workers.world("torch_dist", 2).run(_align, str(tmp_path))
    assert first == second
    assert (first["mean"], first["count"]) == (0.5, 3)
    assert first["mask"] == [[-torch.inf] * 2] * 2
    assert torch.allclose(torch.tensor(first["given"]), (torch.tensor(alone) + torch.tensor(other)) / 2)
    assert [path.name for path in tmp_path.glob("step-00000002/buffers-*.json.gz")] == ["buffers-00000.json.gz"]

"""What a run consists of is sorted once, saved each in its way, and finds its state again by name."""

from __future__ import annotations

import logging

import pyro
import pyro.optim
import pytest
import torch
from torch import nn

import distopt.optim
from distopt.backends.single import Single
from distopt.checkpoint import Checkpointer
from distopt.checkpoint.pyro_files import export_optimizer, read_replicated
from distopt.checkpoint.run_state import RunState
from tests.checkpoint.states import assert_equal


class Counter:
    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def step(optimizer, *names):
    params = [pyro.param(name, torch.zeros(3)).unconstrained() for name in names]
    for number, param in enumerate(params):
        param.grad = torch.full((3,), number + 1.0)
    optimizer(params)


def test_objects_are_sorted_by_how_they_are_saved():
    optimizer, norm, counter, scaler = pyro.optim.Adam({}), nn.BatchNorm1d(2), Counter(), torch.amp.GradScaler("cpu")
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], 0.1))
    state = RunState({"a": optimizer, "b": norm, "c": counter, "d": scaler, "e": schedule}, {"f": Counter()})
    assert state.optimizers == {"a": optimizer}
    assert state.modules == {"b": norm}
    assert state.objects == {"c": counter, "d": scaler, "e": schedule}
    assert [*state.per_rank] == ["f"]
    assert state.compression == {}


def test_distributed_optimizer_with_error_feedback_has_state_of_its_rank():
    plain = distopt.optim.DistributedOptimizer(distopt.optim.Adam({}))
    options = distopt.optim.ReduceOptions(compression="powersgd")
    compressed = distopt.optim.DistributedOptimizer(distopt.optim.Adam({}), reduce=options)
    state = RunState({"plain": plain, "compressed": compressed}, {})
    assert state.compression == {"compressed": compressed.rank_local_state}


@pytest.mark.parametrize("package", [pyro.optim, distopt.optim], ids=["pyro", "distopt"])
def test_two_optimizers_of_different_parameters_get_back_their_own_state(package, tmp_path, caplog):
    def train(num_steps, resume):
        optimizers = {"slow": package.SGD({"lr": 0.1, "momentum": 0.5}), "fast": package.Adam({"lr": 0.5})}
        with Checkpointer(tmp_path, optimizers, backend=Single()) as checkpointer:
            restored = checkpointer.restore(resume)
            for _ in range(restored.step if restored else 0, num_steps):
                step(optimizers["slow"], "x", "y")
                step(optimizers["fast"], "z")
            checkpointer.save(num_steps)
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}

    whole = train(4, "never")
    pyro.clear_param_store()
    train(2, "never")
    assert [*read_replicated(tmp_path / "step-00000002")["optimizers"]] == ["slow", "fast"]
    pyro.clear_param_store()
    caplog.set_level(logging.WARNING)
    assert_equal(train(4, 2), whole)
    assert caplog.text == ""


def test_only_optimizer_finds_its_state_under_any_name(tmp_path, caplog):
    optimizer = distopt.optim.Adam({"lr": 0.1})
    step(optimizer, "x")
    expected = optimizer.get_state()
    with Checkpointer(tmp_path, {"adam": optimizer}, backend=Single()) as checkpointer:
        checkpointer.save(1)
    other = distopt.optim.Adam({"lr": 0.1})
    caplog.set_level(logging.WARNING)
    with Checkpointer(tmp_path, {"optimizer": other}, backend=Single()) as checkpointer:
        checkpointer.restore()
    assert_equal(other.get_state(), expected)
    assert caplog.text == ""
    assert export_optimizer(tmp_path, tmp_path / "adam.pt", "adam") == 1


def test_state_without_object_and_object_without_state_are_named_in_the_log(tmp_path, caplog):
    with Checkpointer(
        tmp_path,
        {"optimizer": distopt.optim.Adam({}), "old": Counter(3), "both": Counter(4)},
        per_rank={"old of rank": Counter()},
        backend=Single(),
    ) as checkpointer:
        checkpointer.save(1)
    both = Counter()
    caplog.set_level(logging.WARNING)
    with Checkpointer(
        tmp_path, {"both": both, "new": Counter()}, per_rank={"new of rank": Counter()}, backend=Single()
    ) as checkpointer:
        checkpointer.restore()
    assert both.value == 4
    assert [record.message for record in caplog.records] == [
        "ignoring state of optimizer in the checkpoint: no such object was passed to Checkpointer",
        "ignoring state of old in the checkpoint: no such object was passed to Checkpointer",
        "the checkpoint has no state of new, which starts from scratch",
        "ignoring state of old of rank in the checkpoint: no such object was passed to Checkpointer",
        "the checkpoint has no state of new of rank, which starts from scratch",
    ]


def test_pyros_optimizer_keeps_no_column_alive_by_a_view_of_it(tmp_path):
    names = [f"x{index}" for index in range(20)]
    optimizer = pyro.optim.Adam({"lr": 0.1})
    step(optimizer, *names)
    with Checkpointer(tmp_path, {"optimizer": optimizer}, backend=Single()) as checkpointer:
        checkpointer.save(1)
        resumed = pyro.optim.Adam({"lr": 0.1})
        checkpointer._state.optimizers["optimizer"] = resumed
        checkpointer.restore()
    step(resumed, *names)
    for state in resumed.get_state().values():
        for tensor in state["state"][0].values():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()

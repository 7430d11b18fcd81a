"""What a `DistributedOptimizer` is to those who hold one: its public members, its errors, what it leaves to others."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import SGD, Adam, DDPOptimizer, DistributedOptimizer, HorovodOptimizer, ReduceOptions, StepInfo
from distopt.optim.distributed.stepping import GradientAccumulator

EXPONENTIAL = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}


@pytest.mark.parametrize(
    ("name", "near"),
    [("local_los", "Known: "), ("nonfinit", "Did you mean 'nonfinite'"), ("backnd", "Did you mean 'backend'")],
)
def test_setting_an_unknown_attribute_is_an_error_that_names_the_nearest(name: str, near: str) -> None:
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}))
    with pytest.raises(AttributeError, match=f"DistributedOptimizer has no attribute '{name}'. {near}"):
        setattr(optimizer, name, 3.0)


@pytest.mark.parametrize("name", ["optim", "backend", "options", "num_skipped_steps", "pt_optim_args", "step"])
def test_setting_what_is_only_read_is_an_error(name: str) -> None:
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}))
    with pytest.raises(AttributeError):
        setattr(optimizer, name, 3.0)


def test_unknown_attribute_is_not_looked_up_in_the_wrapped_optimizer() -> None:
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}))
    assert not hasattr(optimizer, "collect")
    assert not hasattr(optimizer, "_groups")


@pytest.mark.parametrize("make", [DistributedOptimizer, DDPOptimizer, HorovodOptimizer])
def test_only_a_distributed_scheduler_has_step(make: Any) -> None:
    scheduler = make(pyro.optim.ExponentialLR(dict(EXPONENTIAL)))
    assert hasattr(scheduler, "step")
    assert not hasattr(make(SGD({"lr": 1.0})), "step")
    x = pyro.param("x", torch.zeros(1)).unconstrained()
    for _ in range(2):
        x.grad = torch.ones(1)
        scheduler([x])
        scheduler.step()
    assert x.item() == -1.5


def test_wrapped_optimizer_answers_by_name() -> None:
    wrapped = Adam({"lr": 0.5}, {"clip_norm": 1.0})
    optimizer = DistributedOptimizer(wrapped)
    optimizer.nonfinite = "skip"
    assert wrapped.nonfinite == "skip"
    assert optimizer.optim is wrapped
    assert isinstance(optimizer, pyro.optim.PyroOptim)
    assert optimizer.pt_optim_constructor is wrapped.pt_optim_constructor
    assert (optimizer.pt_optim_args, optimizer.pt_clip_args) == ({"lr": 0.5}, {"clip_norm": 1.0})
    x = pyro.param("x", torch.zeros(2)).unconstrained()
    x.grad = torch.full((2,), float("nan"))
    assert optimizer.step_with([x]) == StepInfo(num_active=1)
    assert (optimizer.num_skipped_steps, optimizer.nonfinite_names) == (1, ("x",))
    x.grad = torch.ones(2)
    optimizer([x])
    assert optimizer.get_state().keys() == {"x"}
    assert list(optimizer.optim_objs) == [x]


def test_norm_is_measured_before_clipping_when_it_is_asked_for() -> None:
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}, {"clip_norm": 1.0}))
    x = pyro.param("x", torch.zeros(2)).unconstrained()
    x.grad = torch.tensor([3.0, 4.0])
    assert optimizer.step_with([x], measure_norm=True).gradient_norm == 5.0
    x.grad = torch.tensor([3.0, 4.0])
    assert optimizer.step_with([x]).gradient_norm is None


def test_wish_to_stop_in_a_call_that_only_adds_up_is_told_with_the_step() -> None:
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(backward_passes_per_step=2))
    x = pyro.param("x", torch.zeros(2)).unconstrained()
    x.grad = torch.ones(2)
    assert optimizer.step_with([x], loss=1.0, stop=True) == StepInfo()
    assert optimizer.step_with([x], loss=3.0) == StepInfo(loss=2.0, stop=True, num_active=1)
    x.grad = torch.ones(2)
    assert optimizer.step_with([x], loss=5.0) == StepInfo()
    assert optimizer.step_with([x]) == StepInfo(loss=5.0, num_active=1)


def test_arguments_that_are_not_understood_are_refused() -> None:
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}))
    with pytest.raises(
        TypeError, match="DistributedOptimizer is already distributed; pass the optimizer that it wraps"
    ):
        DistributedOptimizer(optimizer)
    with pytest.raises(TypeError, match="expected an optimizer of distopt.optim or pyro.optim"):
        DistributedOptimizer(torch.optim.SGD([torch.zeros(1)], lr=1.0))
    with pytest.raises(TypeError, match=r"expected ReduceOptions\(...\)"):
        DistributedOptimizer(SGD({"lr": 1.0}), reduce={"op": "sum"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise='same' should be 'independent' or 'shared'"):
        DistributedOptimizer(SGD({"lr": 1.0}), noise="same")  # type: ignore[arg-type]

    with pytest.raises(TypeError, match=r"backend='mpi': expected what distopt\.init\(\) returns"):
        DistributedOptimizer(SGD({"lr": 1.0}), backend="mpi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonfinite is 'skp', expected 'step', 'skip' or 'raise'"):
        optimizer.nonfinite = "skp"
    assert optimizer.nonfinite == "step"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": torch.ones(2)}, "params is a Tensor, expected an iterable of tensors"),
        ({"params": {"x": torch.ones(2)}}, "params is a dict"),
        ({"params": None}, "params is a NoneType"),
        ({"loss": torch.ones(2)}, r"loss has shape \(2,\), expected one number"),
        ({"loss": "1"}, "loss is '1', expected a number"),
        ({"step": "3"}, "step is '3', expected the number of the step"),
        ({"step": 2.5}, "step is 2.5"),
        ({"step": -1}, "step is -1"),
        ({"stop": "no"}, "stop is 'no', expected True or False"),
        ({"stop": None}, "stop is None"),
    ],
)
def test_call_that_is_refused_leaves_nothing_to_the_next_one(arguments: dict[str, Any], message: str) -> None:
    x = pyro.param("x", torch.ones(2)).unconstrained()
    x.grad = torch.ones(2)
    optimizer = DistributedOptimizer(SGD({"lr": 1.0}))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step_with(**{"params": [x], "loss": 7.0, "stop": True, "step": 5} | arguments)
    assert x.tolist() == [1.0, 1.0]

    assert optimizer.step_with([x], loss=3.0, step=2) == StepInfo(loss=3.0, num_active=1)
    assert (x.tolist(), optimizer.reducer.step) == ([0.0, 0.0], 3)


def test_accumulated_gradients_are_the_sums_of_all_calls() -> None:
    accumulator = GradientAccumulator(3)
    x, y = (torch.zeros(2, requires_grad=True) for _ in range(2))
    for call, param in enumerate((x, y, x)):
        param.grad = torch.full((2,), call + 1.0)
        complete = accumulator.add([param])
        assert (complete is None) == (call < 2)
    assert complete is not None and {id(param) for param in complete} == {id(x), id(y)}
    assert x.grad is not None and x.grad.eq(4.0).all()
    assert y.grad is not None and y.grad.eq(2.0).all()
    assert accumulator.take() == []


@pytest.mark.parametrize("make", [DistributedOptimizer, DDPOptimizer, HorovodOptimizer])
@pytest.mark.parametrize("scheduled", [True, False])
def test_it_is_what_it_wraps_and_what_pyro_has_by_its_name(make: Any, scheduled: bool) -> None:
    plain = distopt.optim.ExponentialLR(dict(EXPONENTIAL)) if scheduled else SGD({"lr": 1.0})
    optimizer = make(plain)
    for module in (pyro.optim, distopt.optim):
        assert isinstance(optimizer, module.PyroOptim)
        assert isinstance(optimizer, module.PyroLRScheduler) is scheduled
        assert isinstance(optimizer, module.HorovodOptimizer) is (make is HorovodOptimizer)
    assert isinstance(optimizer, DistributedOptimizer) and type(optimizer) is make
    assert not isinstance(plain, DistributedOptimizer)

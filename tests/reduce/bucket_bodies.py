"""What one rank does in the tests of buckets; what a body returns must be the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyro
import pytest
import torch
from pyro.infer.util import zero_grads
from torch import Tensor

from distopt.backends import current
from distopt.optim import SGD, Adam, DistributedOptimizer, ReduceOptions
from distopt.reduce import layout
from distopt.reduce.messages import NUM_SLOTS
from tests.reduce.option_bodies import schedules_agree_on_the_averaged_metric, sparse_gradients_cross_as_sparse
from tests.reduce.steps import Values, by_rank, counting_calls, step_with, store_values, unconstrained
from tests.reduce.training_bodies import TRAINING

Clear = Callable[[Iterable[Tensor]], None]


def buckets_groups_and_factors_change_nothing() -> Values:
    """Many buckets, groups by name, tensor and number, a factor before the sum: equal to the plain mean."""
    rank, size = current().rank, current().world_size
    options: list[dict[str, object]] = [
        {},
        {"bucket_mib": 0.0001},
        {"groups": [["p3", "p1"], ["p0"]]},
        {"groups": 2},
        {"gradient_predivide_factor": 4.0},
        {"overlap": True, "bucket_mib": 0.0001},
    ]
    values = []
    for option in options:
        pyro.clear_param_store()
        optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(**option))  # type: ignore[arg-type]
        for i in range(5):
            pyro.param(f"p{i}", torch.zeros(10 * i + 1))
        for step in range(3):
            touched = [i for i in range(5) if (i + step + rank) % 3]
            step_with(optim, {f"p{i}": by_rank(10 * step + i, 10 * i + 1)[rank] for i in touched}, loss=1.0)
        values.append(store_values())
    for other in values[1:]:
        for name, value in other.items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(values[0][name]))
    total = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(op="sum"))
    pyro.param("sum", torch.zeros(2))
    step_with(total, {"sum": torch.ones(2)})
    assert unconstrained("sum").eq(-size).all()
    return values[1]


def buckets_start_during_backward() -> Values:
    """With `overlap`, from the last bucket to the first; a parameter left untouched on one rank changes no sum.

    Two backward passes before a call are noticed in the first step that has the buckets.
    """
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(overlap=True, bucket_mib=0.0001))
    names = [f"p{i}" for i in range(5)]
    for step in range(5):
        left_out = names[2] if step == 3 and rank == 0 else None
        params = {pyro.param(name, torch.zeros(40)).unconstrained() for name in names if name != left_out}
        for _ in range(2):
            loss = sum((param * (rank + 1)).sum() for param in params)
            assert isinstance(loss, Tensor)
            loss.backward()
        overlap = optim.reducer._overlap
        if step > 0 and overlap is not None:
            assert overlap.num_started == (0 if step == 1 else 2 if left_out else 4)
        optim(params)
        for param in params:
            param.grad = None
    means = {name: (size + 1) / 2 for name in names}
    for name in names:
        expected = -10 * means[name] + (2 / size if name == "p2" else 0)
        torch.testing.assert_close(unconstrained(name), torch.full((40,), expected))
    params = {pyro.param(name).unconstrained() for name in names}
    for _ in range(2):
        sum(param.sum() for param in params).backward()
    with pytest.raises(RuntimeError, match="was added to when it was being sent already, after 2 backward passes"):
        sum(param.sum() for param in params).backward()
    optim(params)
    return store_values()


def _zero_in_place(params: Iterable[Tensor]) -> None:
    for param in params:
        if param.grad is not None:
            param.grad.zero_()


def _train_while_others_have_news(optim: DistributedOptimizer, clear: Clear, shapes: dict[str, int]) -> None:
    """Six real backward passes; at step 3 the last rank, at step 4 rank 0 brings a new parameter."""
    rank, size = current().rank, current().world_size
    expected = dict.fromkeys(shapes, 0.0)
    for step in range(6):
        names = dict(shapes)
        if (step, rank) in ((3, size - 1), (4, 0)):
            names[f"late{step}"] = 10
        params = {name: pyro.param(name, torch.zeros(numel)).unconstrained() for name, numel in names.items()}
        loss = sum(param.sum() * ((rank + 1) * (step + 1)) for param in params.values())
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        optim(params.values())
        clear(params.values())
        for name in shapes:
            expected[name] -= (size + 1) / 2 * (step + 1)
            assert unconstrained(name).eq(expected[name]).all(), (name, step)
    assert unconstrained("late3").eq(-4.0).all()
    assert unconstrained("late4").eq(-5.0 / size).all()


def gradients_survive_a_round_that_is_made_again() -> Values:
    """However they are cleared, in one bucket and in several large ones: the optimizer leaves views of its buckets."""
    shapes = {"bias": 7, "large": 40_000, "larger": 600_000, "last": 700_000}
    for clear_of in (lambda _: zero_grads, lambda _: _zero_in_place, lambda optim: optim.zero_grad):
        for bucket_mib in (25.0, 3.0):
            pyro.clear_param_store()
            optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(bucket_mib=bucket_mib))
            _train_while_others_have_news(optim, clear_of(optim), shapes)
            assert optim.reducer.layout.control_first == (bucket_mib == 3.0)
    return {"bias": unconstrained("bias").tolist()}


def large_models_look_before_they_send() -> None:
    """A small all-reduce and one for each bucket; a round with news sends nothing large."""
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(bucket_mib=3.0))
    gradients: dict[str, Tensor | None] = {}
    for name in ("a", "b", "c"):
        pyro.param(name, torch.zeros(500_000))
        gradients[name] = torch.ones(500_000)
    step_with(optim, gradients)
    with counting_calls() as calls:
        step_with(optim, gradients)
    assert calls == [("all_reduce", NUM_SLOTS + 3), *[("all_reduce", 500_000)] * 3]
    with counting_calls() as calls:
        if current().rank == 0:
            pyro.param("late", torch.zeros(2))
            gradients["late"] = torch.ones(2)
        step_with(optim, gradients)
    assert [numel for method, numel in calls if method == "all_reduce" and numel > 100] == [500_000] * 2 + [500_002]
    step_with(optim, {"a": torch.ones(500_000), "b": None})
    assert unconstrained("a").eq(-4).all() and unconstrained("b").eq(-3).all()


def dropped_gradients_count_as_zero() -> Values:
    """A large parameter that `zero_grad` has cleared and backward does not reach is stepped by zeros, as Pyro does."""
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    params = {name: pyro.param(name, torch.zeros(40_000)).unconstrained() for name in ("always", "once", "never")}
    for step in range(3):
        (params["always"].sum() + (params["once"].sum() if step == 0 else 0.0)).backward()
        optim(params.values())
        optim.zero_grad(params.values())
    state = optim.get_state()
    assert state["always"]["state"][0]["step"] == state["once"]["state"][0]["step"] == 3
    assert "never" not in state or not state["never"]["state"]
    return {name: unconstrained(name)[:3].tolist() for name in params}


def large_models_follow_the_same_rules() -> None:
    """Bodies of the other suites, with every parameter in a bucket of its own and looked at before it is sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CONTROL_FIRST_BYTES", 0)
        patch.setattr(layout, "MIB", 0)
        for body in (*TRAINING, schedules_agree_on_the_averaged_metric, sparse_gradients_cross_as_sparse):
            pyro.clear_param_store()
            body()


BUCKETS = [
    large_models_follow_the_same_rules,
    buckets_groups_and_factors_change_nothing,
    buckets_start_during_backward,
    gradients_survive_a_round_that_is_made_again,
    large_models_look_before_they_send,
    dropped_gradients_count_as_zero,
]

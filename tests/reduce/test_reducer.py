"""One reduction: what it computes, and the collectives that it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from distopt.backends import current
from distopt.optim import (
    SGD,
    Adam,
    DistributedOptimizer,
    ReduceOptions,
)
from distopt.reduce import layout
from distopt.reduce.messages import NUM_SLOTS
from tests.optim.distributed.test_stepping import LOOPS, _run_guide_that_grows_differently_trains
from tests.reduce.steps import Values, counting_calls, random_values, step_with, store_values, unconstrained
from tests.reduce.test_sparse import _run_sparse_gradients_are_sent_as_sparse
from tests.workers import Ranks


def _run_gradients_are_averaged() -> Values:
    """Equals torch's own SGD on the mean gradient."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 0.1}))
    pyro.param("b", torch.zeros(3))
    pyro.param("a", torch.ones(2, 2), constraint=constraints.positive)
    reference = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    for step in range(3):
        gradients = [
            {name: random_values(100 * step + r + ord(name), *reference[name].shape) for name in reference}
            for r in range(size)
        ]
        info = step_with(optim, gradients[rank])
        for name, value in reference.items():
            value -= 0.1 * torch.stack([each[name] for each in gradients]).mean(0)
            torch.testing.assert_close(unconstrained(name), value)
    assert info.num_active == size
    return store_values()


def _run_steady_state_costs_one_collective() -> None:
    """Counts the calls that reach the backend."""
    rank = current().rank
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    names = [f"p{i}" for i in range(20)]
    for name in names:
        pyro.param(name, torch.zeros(4, 5))
    step_with(optim, {name: random_values(0, 4, 5) for name in names})
    with counting_calls() as calls:
        for step in range(5):
            step_with(optim, {name: random_values(step, 4, 5) for name in names})
        for step in range(4):  # fewer of them, and others on each rank: still one
            step_with(optim, {name: random_values(step, 4, 5) for name in (names[step], names[step + rank + 1])})
    # A rank that is alone and brings every gradient has nothing to sum.
    assert [method for method, _ in calls] == ["all_reduce"] * (9 if current().world_size > 1 else 4)
    assert optim.reducer.num_agreements == 1


def _run_untouched_parameters_are_not_stepped() -> Values:
    """Adam's step counts: of a parameter touched on some rank all count, of one that is not none."""
    rank = current().rank
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    for name in ("always", "sometimes", "missing"):
        pyro.param(name, torch.ones(2))
    for step in range(4):
        gradients: dict[str, Tensor | None] = {"always": torch.ones(2)}
        if step == 2 and rank == 0:
            gradients["sometimes"] = torch.ones(2)
        gradients["missing"] = None
        step_with(optim, gradients)
    state = optim.get_state()
    assert state["always"]["state"][0]["step"] == 4
    assert state["sometimes"]["state"][0]["step"] == 1
    assert "missing" not in state or not state["missing"]["state"]
    assert unconstrained("missing").eq(1).all()
    return store_values()


def _run_large_models_reduce_the_control_slots_first() -> None:
    """A small all-reduce and one for each bucket; a round with news sends nothing large."""
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(bucket_mib=3.0))
    gradients: dict[str, Tensor | None] = {}
    for name in ("a", "b", "c"):
        pyro.param(name, torch.zeros(500_000))
        gradients[name] = torch.ones(500_000)
    step_with(optim, gradients)
    with counting_calls() as calls:
        step_with(optim, gradients)
    expected = [("all_reduce", NUM_SLOTS + 3), *[("all_reduce", 500_000)] * 3]
    assert calls == (expected if current().world_size > 1 else [])
    with counting_calls() as calls:
        if current().rank == 0:
            pyro.param("late", torch.zeros(2))
            gradients["late"] = torch.ones(2)
        step_with(optim, gradients)
    assert [numel for method, numel in calls if method == "all_reduce" and numel > 100] == [500_000] * 2 + [500_002]
    step_with(optim, {"a": torch.ones(500_000), "b": None})
    assert unconstrained("a").eq(-4).all() and unconstrained("b").eq(-3).all()


def _run_parameter_that_appears_costs_what_is_new() -> Values:
    """What is known is summed once, in the order of names after a while; a second round sends what is new."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    gradients: dict[str, Tensor | None] = {name: torch.full((1000,), rank + 1.0) for name in ("m", "n")}
    for name in gradients:
        pyro.param(name, torch.zeros(1000))
    step_with(optim, gradients)
    mean = (size + 1) / 2
    for number, name in enumerate(("b", "z", "a")):
        pyro.param(name, torch.zeros(7))
        gradients[name] = torch.full((7,), rank + 1.0)
        with counting_calls() as calls:
            step_with(optim, gradients)
        numels = [numel for method, numel in calls if method == "all_reduce"]
        assert numels == [2000 + 7 * number + NUM_SLOTS + 2 + number, 7 + NUM_SLOTS + 1]
        assert unconstrained("m").eq(-mean * (number + 2)).all() and unconstrained(name).eq(-mean).all()
    assert optim.reducer.layout.names == ("m", "n", "b", "z", "a")

    while not optim.reducer.layout.is_sorted:
        step_with(optim, gradients)
    assert optim.reducer.layout.names == ("a", "b", "m", "n", "z") and optim.reducer.num_agreements == 4
    with counting_calls() as calls:
        step_with(optim, gradients)
    assert calls == ([("all_reduce", 2021 + NUM_SLOTS + 5)] if size > 1 else [])
    return store_values()


def _run_large_models_follow_the_same_rules() -> None:
    """Bodies of the other suites, with every parameter in a bucket of its own and looked at before it is sent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CONTROL_FIRST_BYTES", 0)
        patch.setattr(layout, "MIB", 0)
        for body in (*LOOPS, _run_sparse_gradients_are_sent_as_sparse):
            pyro.clear_param_store()
            body()


BODIES = [
    _run_gradients_are_averaged,
    _run_steady_state_costs_one_collective,
    _run_untouched_parameters_are_not_stepped,
    _run_large_models_reduce_the_control_slots_first,
    _run_parameter_that_appears_costs_what_is_new,
    _run_large_models_follow_the_same_rules,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.removeprefix("_run_"))
def test_reduction_on_every_backend(ranks: Ranks, body: Callable[[], Any]) -> None:
    ranks.run_alike(body)


OTHER_STARTS = [("horovod-mpi", 2), ("mpirun-horovod", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("start", OTHER_STARTS, ids=lambda start: f"{start[0]}-{start[1]}")
def test_reduction_under_the_other_launchers_of_horovod(start: tuple[str, int]) -> None:
    for body in (_run_gradients_are_averaged, _run_guide_that_grows_differently_trains):
        Ranks(*start).run_alike(body)

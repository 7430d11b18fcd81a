"""What ranks do when one of them has a parameter that the others lack, or holds one otherwise."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import identity_transform

from distopt.backends import current
from distopt.constraints import _KNOWN, register_constraint
from distopt.optim import (
    SGD,
    Adam,
    DistributedOptimizer,
    ReduceOptions,
)
from distopt.reduce import DisagreementError
from tests.reduce.steps import Values, random_values, step_with, store_values, unconstrained
from tests.workers import Ranks


def _run_parameter_of_one_rank_is_created_everywhere() -> Values:
    """Each rank has one of its own, from another step on; all have all of them, stepped by the zero-aware mean."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("shared", torch.zeros(2))
    expected = {r: 3.0 + r for r in range(size)}
    for step in range(size + 2):
        gradients: dict[str, Tensor | None] = {"shared": torch.ones(2)}
        if step >= rank:
            pyro.param(f"own{rank}", lambda: torch.tensor([3.0 + rank]), constraint=constraints.positive)
            gradients[f"own{rank}"] = torch.full((1,), float(size))
        step_with(optim, gradients)
        for r in range(min(step + 1, size)):
            start = torch.tensor([3.0 + r]).log()
            torch.testing.assert_close(unconstrained(f"own{r}"), start - (step + 1 - r))
            assert type(pyro.get_param_store()._constraints[f"own{r}"]) is type(constraints.positive)
    assert len(expected) == size
    torch.testing.assert_close(unconstrained("shared"), torch.full((2,), -(size + 2.0)))
    return store_values()


def _run_order_of_creation_does_not_matter() -> Values:
    """Same shapes, created in reverse on odd ranks: gradients are not swapped."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    names = ["u", "v", "w"]
    for name in names if rank % 2 == 0 else reversed(names):
        pyro.param(name, torch.zeros(4))
    for _ in range(2):
        step_with(
            optim, {name: torch.full((4,), float(10**position) * (rank + 1)) for position, name in enumerate(names)}
        )
    for position, name in enumerate(names):
        assert unconstrained(name).eq(-2 * 10**position * (size + 1) / 2).all()
    return store_values()


def _run_first_values_come_from_the_lowest_rank() -> Values:
    """Ranks start from other seeds; `late` is first seen on the highest rank alone, but rank 0 has it in its store."""
    rank, size = current().rank, current().world_size
    pyro.set_rng_seed(rank)
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.full((2,), float(rank)))
    step_with(optim, {"x": torch.zeros(2)})
    assert unconstrained("x").eq(0).all()
    if rank in (0, size - 1):
        pyro.param("late", torch.full((2,), 7.0 + rank))
    step_with(optim, {"x": torch.zeros(2)} | ({"late": torch.zeros(2)} if rank == size - 1 else {}))
    assert unconstrained("late").eq(7).all()
    return store_values()


def _run_synchronize_agrees_before_the_first_step() -> Values:
    """The first gradients are computed from equal values, and a module's buffers are equal."""
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 0.5}))
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(float(rank + 4))
    pyro.param("x", torch.full((2,), float(rank + 1)))
    optim.synchronize(modules=[norm])
    assert norm.running_mean.eq(4).all()
    param = pyro.param("x").unconstrained()
    param.square().sum().backward()
    optim({param})
    assert unconstrained("x").eq(0).all()
    return store_values()


def _disagreement(**differs: Any) -> str:
    rank = current().rank
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("fine", torch.zeros(2))
    step_with(optim, {"fine": torch.ones(2)})
    last = rank == current().world_size - 1
    dtype = differs.get("dtype", torch.float32) if last else torch.float32
    shape = differs.get("shape", (4, 3)) if last else (4, 3)
    constraint = differs.get("constraint", constraints.positive) if last else constraints.positive
    pyro.param("z", torch.ones(shape, dtype=dtype), constraint=constraint)
    before = store_values()
    with pytest.raises(DisagreementError) as raised:
        step_with(optim, {"fine": torch.ones(2), "z": torch.ones(shape, dtype=dtype)})
    assert store_values() == before
    return str(raised.value).replace(f"rank {rank} of", "rank R of", 1)


def _run_disagreement_is_the_same_error_everywhere() -> list[str]:
    """Other shapes (of as many elements or not), dtypes, constraints: each names the parameter, ranks and values."""
    if current().world_size == 1:
        return []
    cases: list[tuple[dict[str, Any], tuple[str, str]]] = [
        ({"shape": (3, 4)}, ("(4, 3)", "(3, 4)")),
        ({"shape": (5,)}, ("(4, 3)", "(5,)")),
        ({"dtype": torch.float64}, ("float32", "float64")),
        ({"constraint": constraints.interval(0.0, 2.0)}, ("GreaterThan", "Interval")),
    ]
    texts = []
    for differs, values in cases:
        pyro.clear_param_store()
        texts.append(text := _disagreement(**differs))
        assert "'z'" in text and "step 1" in text and all(value in text for value in values), text
        assert f"rank {current().world_size - 1}: " in text, text
    return texts


def _run_options_that_differ_are_an_error_before_the_first_step() -> None:
    """Another bucket size on one rank would pair unlike collectives."""
    if current().world_size == 1:
        return
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(bucket_mib=25.0 if current().rank else 1.0))
    pyro.param("x", torch.zeros(2))
    with pytest.raises(DisagreementError, match=r"bucket_mib differs.*rank 0: 1.0"):
        step_with(optim, {"x": torch.ones(2)})


class Odd(constraints.Constraint):
    """A user's own constraint, without a description until it is registered."""

    def __init__(self, order: int) -> None:
        self.order = order

    def __call__(self, value: Tensor) -> Tensor:
        """Says of nothing that it is outside."""
        return torch.ones_like(value, dtype=torch.bool)


transform_to.register(Odd, lambda constraint: identity_transform)


def _run_constraint_of_the_user_needs_registering_where_it_is_created() -> Values:
    """A class that all ranks use is only compared; to be created where it is missing it must be registered there."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("odd", torch.ones(2), constraint=Odd(1))
    step_with(optim, {"odd": torch.ones(2)})
    gradients: dict[str, Tensor | None] = {"odd": torch.ones(2)}
    if rank == size - 1:
        pyro.param("odd2", torch.ones(2), constraint=Odd(2))
        gradients["odd2"] = torch.ones(2)
    try:
        if size > 1:
            with pytest.raises(DisagreementError, match="'odd2' cannot be created.*Odd.*register_constraint"):
                step_with(optim, gradients)
        register_constraint(Odd)
        step_with(optim, gradients)
    finally:
        _KNOWN.pop("Odd", None)
    assert unconstrained("odd").eq(-1).all()
    assert pyro.get_param_store()._constraints["odd2"].order == 2
    return store_values()


def _run_failed_creation_changes_no_rank() -> Values:
    """Of two new parameters one cannot be created: neither is, and the next call takes both from the rank with them."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    step_with(optim, {"x": torch.ones(2)})
    gradients: dict[str, Tensor | None] = {"x": torch.ones(2)}
    if rank == size - 1:
        pyro.param("fine", torch.full((2,), 7.0))
        pyro.param("odd", torch.ones(2), constraint=Odd(1))
        gradients |= {"fine": torch.ones(2), "odd": torch.ones(2)}
    try:
        if size > 1:
            with pytest.raises(DisagreementError, match="'odd' cannot be created"):
                step_with(optim, gradients)
            assert ("fine" in pyro.get_param_store()) == (rank == size - 1)
        register_constraint(Odd)
        step_with(optim, gradients)
    finally:
        _KNOWN.pop("Odd", None)
    torch.testing.assert_close(unconstrained("fine"), torch.full((2,), 7.0 - 1.0 / size))
    return store_values()


def _run_files_loaded_into_a_live_run_are_applied() -> Values:
    """`ParamStore.load` and `load` of the optimizer, in the middle: values and step counts go on from the file's."""
    rank = current().rank
    optim = DistributedOptimizer(Adam({"lr": 0.1}))
    names = ("x", "y")
    for name in names:
        pyro.param(name, torch.zeros(2), constraint=constraints.positive if name == "y" else constraints.real)

    def train(first: int, last: int) -> Values:
        for step in range(first, last):
            step_with(optim, {name: random_values(10 * step + rank + ord(name), 2) for name in names})
        return store_values()

    with TemporaryDirectory() as folder:
        store_file, state_file = f"{folder}/store", f"{folder}/optim"
        train(0, 3)
        pyro.get_param_store().save(store_file)
        optim.optim.save(state_file)  # of the wrapped one, which writes on every rank
        straight = train(3, 6)
        pyro.get_param_store().load(store_file)
        optim.load(state_file)
        assert train(3, 6) == straight
    state = optim.get_state()
    assert sorted(state) == sorted(names)
    assert {name: int(state[name]["state"][0]["step"]) for name in names} == {"x": 6, "y": 6}
    assert sorted(map(id, optim.optim.optim_objs)) == sorted(id(pyro.param(name).unconstrained()) for name in names)
    return straight


def _run_replaced_and_cleared_parameters_are_agreed_anew() -> Values:
    """`store[name] = value` on one rank counts for all; a cleared store starts over, other shapes included."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}))
    pyro.param("x", torch.zeros(2))
    pyro.param("y", torch.zeros(2))
    step_with(optim, {"x": torch.ones(2), "y": torch.ones(2)})
    if rank == size - 1:
        pyro.get_param_store()["x"] = torch.full((2,), 5.0)
    step_with(optim, {"x": torch.ones(2), "y": torch.ones(2)})
    assert unconstrained("x").eq(4).all() and unconstrained("y").eq(-2).all()
    pyro.clear_param_store()
    pyro.param("y", torch.full((3,), 9.0))
    for _ in range(2):
        step_with(optim, {"y": torch.ones(3)})
    assert unconstrained("y").eq(7).all()
    assert optim.reducer.layout.names == ("y",)
    return store_values()


BODIES = [
    _run_parameter_of_one_rank_is_created_everywhere,
    _run_order_of_creation_does_not_matter,
    _run_first_values_come_from_the_lowest_rank,
    _run_synchronize_agrees_before_the_first_step,
    _run_disagreement_is_the_same_error_everywhere,
    _run_options_that_differ_are_an_error_before_the_first_step,
    _run_constraint_of_the_user_needs_registering_where_it_is_created,
    _run_failed_creation_changes_no_rank,
    _run_files_loaded_into_a_live_run_are_applied,
    _run_replaced_and_cleared_parameters_are_agreed_anew,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__.removeprefix("_run_"))
def test_agreement_on_every_backend(ranks: Ranks, body: Callable[[], Any]) -> None:
    ranks.run_alike(body)

"""Any schedule of which rank touches which parameter when leaves replicas equal, and equal to one process."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.optim.clipped_adam import ClippedAdam as PlainClippedAdam

import distopt.optim
from distopt.backends import current
from distopt.optim import SGD, Adam, DistributedOptimizer, ReduceOptions
from distopt.reduce import layout
from distopt.reduce.reducer import SORTED_AFTER
from tests import workers
from tests.reduce.steps import random_values, step_with, store_values

SIZE = 2
SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (), "c": (4,), "d": (1, 5)}
Schedule = list[list[list[str]]]

schedules = st.lists(
    st.lists(st.lists(st.sampled_from(sorted(SHAPES)), unique=True), min_size=SIZE, max_size=SIZE),
    min_size=1,
    max_size=6,
)


def follow(schedule: Schedule, options: dict[str, Any], is_large: bool) -> list[dict[str, Any]]:
    """Steps by a schedule: [step][rank] -> names touched, in the order of creation; returns the store after each."""
    rank = current().rank
    optim = DistributedOptimizer(Adam({"lr": 0.1}), reduce=ReduceOptions(**options))
    stores = []
    with pytest.MonkeyPatch.context() as patch:
        if is_large:
            patch.setattr(layout, "CONTROL_FIRST_BYTES", 0)
        for step, touched in enumerate(schedule):
            for name in touched[rank]:
                pyro.param(name, lambda name=name: random_values(ord(name) + 1000 * rank, *SHAPES[name]))
            step_with(optim, {name: _gradient(step, rank, name) for name in touched[rank]})
            stores.append(store_values())
    return stores


def _gradient(step: int, rank: int, name: str) -> torch.Tensor:
    return random_values(10 * (step + 100 * rank) + ord(name), *SHAPES[name])


def reference(schedule: Schedule) -> list[dict[str, torch.Tensor]]:
    """torch's Adam, one for each parameter, on the mean of the gradients with zeros for those absent."""
    params: dict[str, torch.Tensor] = {}
    optims: dict[str, torch.optim.Optimizer] = {}
    stores = []
    for step, touched in enumerate(schedule):
        for name in sorted({name for names in touched for name in names}):
            if name not in params:
                first = next(rank for rank, names in enumerate(touched) if name in names)
                params[name] = random_values(ord(name) + 1000 * first, *SHAPES[name]).requires_grad_()
                optims[name] = torch.optim.Adam([params[name]], lr=0.1)
            present = [_gradient(step, rank, name) for rank, names in enumerate(touched) if name in names]
            params[name].grad = torch.stack(present).sum(0) / SIZE
            optims[name].step()
        stores.append({name: param.detach().clone() for name, param in params.items()})
    return stores


@given(schedule=schedules, bucket_mib=st.sampled_from([25.0, 0.00002]), overlap=st.booleans(), is_large=st.booleans())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule_keeps_replicas_equal_to_one_process(
    schedule: Schedule, bucket_mib: float, overlap: bool, is_large: bool
) -> None:
    options = {"bucket_mib": bucket_mib, "overlap": overlap, "drift_every_steps": 1}
    results = workers.world("torch_dist", SIZE).run(follow, schedule, options, is_large)
    assert all(result == results[0] for result in results)
    for actual, expected in zip(results[0], reference(schedule), strict=True):
        assert set(actual) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(torch.tensor(actual[name]), value)


NUM_BORN = 12
KINDS = (torch.float32, torch.float32, torch.float64, torch.complex64)
OPTIONS = (
    {},
    {"bucket_mib": 0.00002},
    {"overlap": True},
    {"groups": 2},
    {"groups": (("01", "07"),)},
    {"compression": "bf16"},
    {"compression": "fp16"},
    {"op": "adasum"},
    {"op": "sum"},
)
births = st.lists(
    st.tuples(
        st.lists(st.sets(st.integers(0, NUM_BORN - 1), max_size=3), min_size=SIZE, max_size=SIZE),
        st.sampled_from([1, 1, 2, SORTED_AFTER + 2]),
    ),
    min_size=1,
    max_size=6,
)
Births = list[tuple[list[set[int]], int]]


def _born(index: int) -> torch.Tensor:
    shape = list(SHAPES.values())[index % len(SHAPES)]
    return torch.full(shape, float(index), dtype=KINDS[index * 5 % len(KINDS)])


def _gradient_of(param: torch.Tensor, seed: int) -> torch.Tensor | None:
    """A gradient, or none; whole numbers, whose sums are the same in 16 bits, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 9, param.shape, generator=generator).to(param.dtype) * 2
    return None if seed % 7 == 0 else values


def grow_or_begin_whole(births: Births, options: dict[str, Any], is_large: bool) -> list[list[dict[str, Any]]]:
    """The stores after each step of a model that grows, and of the same steps with all parameters known before."""
    rank = current().rank
    indices = sorted({index for by_rank, _ in births for born in by_rank for index in born})
    results = []
    with pytest.MonkeyPatch.context() as patch:
        if is_large:
            patch.setattr(layout, "CONTROL_FIRST_BYTES", 0)
        for is_whole in (False, True):
            pyro.clear_param_store()
            optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(**options))
            if is_whole:
                for index in indices:
                    pyro.param(f"{index:02d}", _born(index))
                optim.synchronize()
            results.append(_take_births(optim, births, rank))
            assert optim.reducer.layout.is_sorted or births[-1][1] < SORTED_AFTER
    return results


def _take_births(optim: DistributedOptimizer, births: Births, rank: int) -> list[dict[str, Any]]:
    known: set[int] = set()  # on this rank, whose calls do not pass what others have brought
    seen: set[str] = set()
    stores = []
    step = 0
    for by_rank, num_steps in births:
        known |= by_rank[rank]
        seen.update(f"{index:02d}" for born in by_rank for index in born)
        for _ in range(num_steps):
            step += 1
            gradients = {}
            for index in sorted(known):
                param = pyro.param(f"{index:02d}", lambda index=index: _born(index)).unconstrained()
                gradients[f"{index:02d}"] = _gradient_of(param, 100 * step + 10 * rank + index)
            step_with(optim, gradients)
            stores.append({name: value for name, value in store_values().items() if name in seen})
    return stores


@pytest.mark.slow
@given(births=births, options=st.sampled_from(OPTIONS), is_large=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_model_that_grows_is_stepped_bit_by_bit_as_one_that_is_whole(
    births: Births, options: dict[str, Any], is_large: bool
) -> None:
    results = workers.world("torch_dist", SIZE).run(grow_or_begin_whole, births, options, is_large)
    assert all(result == results[0] for result in results)
    grown, whole = results[0]
    assert grown == whole


NUM_GROWN = 24
STEADY = 40  # calls until everything that may be joined is
OPTIMIZERS = {
    "Adam": ({"lr": 0.1}, lambda p: torch.optim.Adam([p], lr=0.1)),
    "ClippedAdam": ({"lr": 0.1, "lrd": 0.97}, lambda p: PlainClippedAdam([p], lr=0.1, lrd=0.97)),
    "SGD": ({"lr": 0.1, "momentum": 0.9}, lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9)),
}


def _shape(name: str) -> tuple[int, ...]:
    return list(SHAPES.values())[int(name) % len(SHAPES)]


def _grown_gradient(step: int, rank: int, name: str) -> torch.Tensor | None:
    """Some have none: of a parameter on one rank, or on all of them, which may be steps after it has appeared."""
    if (step * 7 + int(name) * 3) % 11 == 0 or (step * 5 + int(name) + 4 * rank) % 9 == 0:
        return None
    return random_values(1000 * step + 100 * rank + int(name), *_shape(name))


def _names_at(step: int, rank: int) -> list[str]:
    """The parameters of a step: one more at each, in another order on each rank, until both have all of them."""
    order = torch.randperm(NUM_GROWN, generator=torch.Generator().manual_seed(rank)).tolist()
    return [f"{index:02d}" for index in order[: step + 1]]


def grow(name: str) -> dict[str, Any]:
    """A model that grows; its state is saved when it has grown, and taken over by an optimizer that begins there."""
    rank = current().rank
    args, _ = OPTIMIZERS[name]
    optim = DistributedOptimizer(getattr(distopt.optim, name)(args))
    middle = NUM_GROWN + STEADY // 2

    def take_steps(optim: DistributedOptimizer, steps: range) -> None:
        for step in steps:
            for each in _names_at(step, rank):
                pyro.param(each, lambda each=each: random_values(int(each) + 1000 * rank, *_shape(each)))
            step_with(optim, {each: _grown_gradient(step, rank, each) for each in _names_at(step, rank)})

    take_steps(optim, range(middle))
    store, state = pyro.get_param_store().get_state(), optim.get_state()
    copied = {each: p.detach().clone().requires_grad_() for each, p in store["params"].items()}
    take_steps(optim, range(middle, NUM_GROWN + STEADY))
    grown = store_values()
    grown_state = {each: _numbers(value) for each, value in sorted(optim.get_state().items())}

    pyro.get_param_store().set_state({"params": copied, "constraints": store["constraints"]})
    at_once = DistributedOptimizer(getattr(distopt.optim, name)(args))
    at_once.set_state(state)
    take_steps(at_once, range(middle, NUM_GROWN + STEADY))
    state_at_once = {each: _numbers(value) for each, value in sorted(at_once.get_state().items())}
    return {"grown": (grown, grown_state), "at once": (store_values(), state_at_once)}


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    values = {key: torch.as_tensor(value).tolist() for key, value in state["state"][0].items()}
    return values | {"lr": state["param_groups"][0]["lr"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_layout_that_has_grown_computes_what_one_made_at_once_does(name: str) -> None:
    results = workers.world("torch_dist", SIZE).run(grow, name)
    assert all(result == results[0] for result in results)

    params: dict[str, torch.Tensor] = {}
    optims: dict[str, torch.optim.Optimizer] = {}
    for step in range(NUM_GROWN + STEADY):
        by_rank = [_names_at(step, rank) for rank in range(SIZE)]
        for each in {each for names in by_rank for each in names}:
            holders = [rank for rank, names in enumerate(by_rank) if each in names]
            if each not in params:
                params[each] = random_values(int(each) + 1000 * holders[0], *_shape(each)).requires_grad_()
                optims[each] = OPTIMIZERS[name][1](params[each])
            present = [_grown_gradient(step, rank, each) for rank in holders]
            sums = [gradient for gradient in present if gradient is not None]
            params[each].grad = torch.stack(sums).sum(0) / SIZE if sums else None
            optims[each].step()  # also without a gradient, as `pyro.optim` does: the rate decays

    for values, states in results[0].values():
        assert set(values) == set(params)
        for each, value in params.items():
            torch.testing.assert_close(torch.tensor(values[each]), value.detach(), rtol=1e-4, atol=1e-5)
            state = dict(next(iter(optims[each].state.values()))) | {"lr": optims[each].param_groups[0]["lr"]}
            assert set(states[each]) == set(state)
            for key, expected in state.items():
                actual = torch.as_tensor(states[each][key], dtype=torch.float64)
                torch.testing.assert_close(actual, torch.as_tensor(expected).double(), rtol=1e-4, atol=1e-5)

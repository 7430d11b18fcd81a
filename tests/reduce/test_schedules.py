"""Any schedule of which rank touches which parameter when leaves replicas equal, and equal to one process."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distopt.backends import current
from distopt.optim import Adam, DistributedOptimizer, ReduceOptions
from distopt.reduce import layout
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

"""Buckets that are sent while backward still runs."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedOptimizer,
    ReduceOptions,
)
from distopt.reduce.reducer import SORTED_AFTER
from tests.reduce.steps import Values, store_values, unconstrained
from tests.workers import Ranks


def _run_buckets_start_during_backward() -> Values:
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


def _run_model_grows_while_ranks_touch_different_parameters() -> Values:
    """What is under way when a call begins is what it waits for, also once no parameter has come for a while."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(overlap=True, bucket_mib=0.0001))
    names = ["m", "n", "o"]
    num_steps = SORTED_AFTER + 6
    for step in range(num_steps):
        if step == 2:
            names.append("a")
        left_out = "o" if step % 2 and rank == 1 else None
        params = {pyro.param(name, torch.zeros(20 + ord(name))).unconstrained() for name in names if name != left_out}
        loss = sum((param * (rank + 1)).sum() for param in params)
        assert isinstance(loss, Tensor)
        loss.backward()
        optim(params)
        for param in params:
            param.grad = None
    mean = (size + 1) / 2
    assert unconstrained("m").eq(-mean * num_steps).all() and unconstrained("a").eq(-mean * (num_steps - 2)).all()
    expected = -mean * num_steps + (num_steps // 2 * 2 / size if size > 1 else 0)
    torch.testing.assert_close(unconstrained("o"), torch.full_like(unconstrained("o"), expected))
    return store_values()


def test_model_grows_while_ranks_touch_different_parameters(ranks: Ranks) -> None:
    ranks.run_alike(_run_model_grows_while_ranks_touch_different_parameters)


def test_buckets_start_during_backward(ranks: Ranks) -> None:
    ranks.run_alike(_run_buckets_start_during_backward)

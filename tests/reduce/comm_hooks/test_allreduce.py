"""The sum of gradients in full and in 16-bit precision."""

from __future__ import annotations

import pyro
import pytest
import torch

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedOptimizer,
    HorovodOptimizer,
    ReduceOptions,
)
from tests.reduce.steps import Values, by_rank, step_with, store_values, unconstrained
from tests.workers import Ranks


def _run_sixteen_bits_stay_close_to_the_mean() -> Values:
    """Errors below 2^-10 and 2^-7 of the largest gradient, control slots exact, large float16 sums finite."""
    rank, size = current().rank, current().world_size
    for compression, bits in (("fp16", 10), ("bf16", 7)):
        optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(compression=compression))
        pyro.param(compression, torch.zeros(300))
        gradients = by_rank(1, 300)
        info = step_with(optim, {compression: gradients[rank]}, loss=1.0 + rank / 3)
        mean = torch.stack(gradients).mean(0)
        error = (unconstrained(compression) + mean).abs().max()
        assert 0 < error <= 2.0**-bits * torch.stack(gradients).abs().max()
        assert info.loss == pytest.approx(1.0 + (size - 1) / 6, rel=1e-6)
    optim = HorovodOptimizer(SGD({"lr": 1.0}), compression="fp16")
    pyro.param("large", torch.zeros(2))
    step_with(optim, {"large": torch.full((2,), 60000.0)})
    assert unconstrained("large").eq(-60000.0).all()
    return store_values()


def test_sixteen_bits_stay_close_to_the_mean(ranks: Ranks) -> None:
    ranks.run_alike(_run_sixteen_bits_stay_close_to_the_mean)

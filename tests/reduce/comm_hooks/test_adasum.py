"""Adasum, compared with its formula."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedOptimizer,
    ReduceOptions,
)
from tests.reduce.steps import Values, by_rank, step_with, store_values, unconstrained
from tests.workers import Ranks


def _adasum(a: Tensor, b: Tensor) -> Tensor:
    return a * (1 - a @ b / (2 * a @ a)) + b * (1 - a @ b / (2 * b @ b))


def _run_adasum_follows_its_formula() -> Values:
    """The paper's recursion, written plainly in float64; equal gradients give their mean, orthogonal ones the sum."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 1.0}), reduce=ReduceOptions(op="adasum"))
    gradients = {name: by_rank(seed, *shape) for seed, (name, shape) in enumerate([("a", (5,)), ("b", (2, 3))])}
    for name, each in gradients.items():
        pyro.param(name, torch.zeros(each[0].shape))
    pyro.param("same", torch.zeros(4))
    pyro.param("apart", torch.zeros(8))
    apart = torch.zeros(8)
    apart[rank] = 1.0
    step_with(optim, {name: each[rank] for name, each in gradients.items()} | {"same": torch.ones(4), "apart": apart})
    for name, each in gradients.items():
        vectors = [vector.double().reshape(-1) for vector in each]
        core = 1 << (size.bit_length() - 1)
        folded = [_adasum(vectors[r], vectors[r + core]) if r + core < size else vectors[r] for r in range(core)]
        while len(folded) > 1:
            folded = [_adasum(folded[i], folded[i + 1]) for i in range(0, len(folded), 2)]
        torch.testing.assert_close(unconstrained(name).double().reshape(-1), -folded[0], rtol=1e-5, atol=1e-6)
    assert unconstrained("same").eq(-1).all()
    assert unconstrained("apart")[:size].eq(-1).all()
    return store_values()


def test_adasum_follows_its_formula(ranks: Ranks) -> None:
    ranks.run_alike(_run_adasum_follows_its_formula)

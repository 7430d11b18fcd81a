"""Sparse gradients, which are summed without being made dense."""

from __future__ import annotations

import pyro
import torch

from distopt.backends import current
from distopt.optim import (
    SGD,
    DistributedOptimizer,
    ReduceOptions,
    SparseAdam,
)
from tests.reduce.steps import Values, step_with, store_values, unconstrained
from tests.workers import Ranks


def _run_sparse_gradients_are_sent_as_sparse() -> Values:
    """An embedding under SparseAdam: rows of every rank arrive, others are not touched; dense gives the same sums."""
    rank, size = current().rank, current().world_size
    results = []
    for densify in (False, True):
        pyro.clear_param_store()
        optim = DistributedOptimizer(
            SGD({"lr": 1.0}) if densify else SparseAdam({"lr": 0.1}),
            reduce=ReduceOptions(sparse_as_dense=densify, bucket_mib=1.0),
        )
        pyro.param("table", torch.zeros(20, 3))
        pyro.param("dense", torch.zeros(2))
        for step in range(3):
            table = pyro.param("table").unconstrained()
            rows = torch.tensor([rank, rank, 10 + step])
            looked_up = torch.nn.functional.embedding(rows, table, sparse=True)
            table.grad = None
            looked_up.sum().backward()
            assert table.grad is not None and table.grad.is_sparse
            if densify:
                step_with(optim, {"table": table.grad, "dense": torch.ones(2)})
            elif step == 1 and rank == 0 and size > 1:
                step_with(optim, {"table": None})
            else:
                step_with(optim, {"table": table.grad})
        results.append(unconstrained("table"))
    assert results[0][size:10].eq(0).all() and results[0][13:].eq(0).all()
    assert results[0][:size].ne(0).all() and results[0][10:13].ne(0).all()
    torch.testing.assert_close(results[1][:size], torch.full((size, 3), -6.0 / size))
    torch.testing.assert_close(results[1][10:13], torch.full((3, 3), -1.0))
    return store_values()


def test_sparse_gradients_are_sent_as_sparse(ranks: Ranks) -> None:
    ranks.run_alike(_run_sparse_gradients_are_sent_as_sparse)

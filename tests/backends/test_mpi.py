"""What MPI needs besides the contract: 16-bit floating point, and memory that it can write."""

from __future__ import annotations

import pytest
import torch

from distopt.backends import current
from tests import workers

pytest.importorskip("mpi4py", reason="mpi4py is not installed (make setup-dev)")


def _run_half_precision() -> None:
    backend = current()
    for dtype in (torch.float16, torch.bfloat16):
        rows = [torch.tensor([rank + 0.5, -rank, 0.1, 1000.0], dtype=dtype) for rank in range(backend.world_size)]
        for op, combine in (("sum", torch.add), ("min", torch.minimum), ("max", torch.maximum)):
            tensor = rows[backend.rank].clone()
            backend.all_reduce(tensor, op).wait()
            expected = rows[0]
            for row in rows[1:]:
                expected = combine(expected, row)
            torch.testing.assert_close(tensor, expected, rtol=2e-2 if op == "sum" else 0, atol=0)


def test_16_bit_floating_point_is_combined_as_torch_does():
    workers.world("mpi", 2).run(_run_half_precision)


def _run_strided() -> None:
    backend = current()
    whole = torch.full((4, 6), backend.rank + 1.0)
    backend.all_reduce(whole[:, ::2]).wait()
    assert whole[:, ::2].eq(sum(range(1, backend.world_size + 1))).all()
    assert whole[:, 1::2].eq(backend.rank + 1).all()
    backend.broadcast(whole.t(), 1).wait()
    assert whole[:, 1::2].eq(2).all()


def test_tensor_that_is_not_contiguous_is_written_where_it_is():
    workers.world("mpi", 2).run(_run_strided)

"""What is finite is told from what is not, in every dtype and layout, also where sums overflow."""

from __future__ import annotations

import math

import pytest
import torch

from distopt.nonfinite import is_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype):
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest)
    largest[4] = math.nan
    assert not is_finite(largest)
    assert is_finite(torch.arange(4)) and is_finite(torch.ones(3).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo])
@pytest.mark.parametrize(
    ("value", "finite"), [(1.0, True), (float("nan"), False), (float("-inf"), False), (3e38, True)]
)
def test_finite_gradients_are_told_from_others_though_their_sum_overflows(
    layout: torch.layout, value: float, finite: bool
) -> None:
    gradient = torch.tensor([3e38, 1.0, value])
    assert is_finite(gradient if layout is torch.strided else gradient.to_sparse()) == finite

"""Numerics without noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def same_noise_in_every_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Float64, and 0.3 in place of each standard normal number, so that one process and many draw alike."""
    import torch

    def constant(shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.full(tuple(shape), 0.3, dtype=dtype, device=device)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", constant)
    monkeypatch.setattr("torch.distributions.multivariate_normal._standard_normal", constant)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

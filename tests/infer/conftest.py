"""Numerics without noise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def same_draws_in_every_row() -> Iterator[None]:
    """Float64, and 0.3 in place of each standard normal number, so that one process and many draw alike."""
    from tests.infer.one_process import same_draws

    with same_draws():
        yield

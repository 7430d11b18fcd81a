"""What Pyro's own optimizers have in common: checks of their arguments, and the closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def check_at_least_zero(optimizer: str, **values: float) -> None:
    """Raises ValueError for a negative number or NaN among `values`."""
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"{optimizer}: {name} is {value}, expected a number >= 0.")


def check_betas(optimizer: str, betas: tuple[float, float]) -> None:
    """Raises ValueError unless both decay rates are in [0, 1)."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"{optimizer}: betas are {betas}, expected two numbers in [0, 1).")


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Returns what `closure` returns, called with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()

"""`HorovodOptimizer`, where `pyro.optim` has it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distopt.optim.optim import PyroOptim

if TYPE_CHECKING:
    from distopt.optim.distributed import HorovodOptimizer

__all__ = ["HorovodOptimizer", "PyroOptim"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the core knows no worker and no network.
    if name == "HorovodOptimizer":
        return getattr(import_module("distopt.optim.distributed"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

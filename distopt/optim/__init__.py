"""Per-parameter optimizers, drop-in for `pyro.optim`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distopt.optim.amp import ScaledELBO
from distopt.optim.arguments import by_name
from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.multi import MixedMultiOptimizer, MultiOptimizer, Newton, PyroMultiOptimizer, TorchMultiOptimizer
from distopt.optim.optim import PyroOptim
from distopt.optim.packed_state import PackedState, StateColumns
from distopt.optim.packing import FlatGradients
from distopt.optim.pytorch_optimizers import *  # noqa: F403
from distopt.optim.pytorch_optimizers import __all__ as _generated
from distopt.optim.state import is_scheduler

if TYPE_CHECKING:
    from distopt.optim.distributed import (
        DDPOptimizer,
        DistributedMultiOptimizer,
        DistributedOptimizer,
        HorovodOptimizer,
        ReduceOptions,
        StepInfo,
    )

_DISTRIBUTED = (
    "DDPOptimizer",
    "DistributedMultiOptimizer",
    "DistributedOptimizer",
    "HorovodOptimizer",
    "ReduceOptions",
    "StepInfo",
)

pytorch_optims = _generated
"""The names that are generated, as `pyro.optim` calls the list."""

__all__ = [
    "DDPOptimizer",
    "DistributedMultiOptimizer",
    "DistributedOptimizer",
    "FlatGradients",
    "HorovodOptimizer",
    "MixedMultiOptimizer",
    "MultiOptimizer",
    "Newton",
    "PackedState",
    "PyroLRScheduler",
    "PyroMultiOptimizer",
    "PyroOptim",
    "ReduceOptions",
    "ScaledELBO",
    "StateColumns",
    "StepInfo",
    "TorchMultiOptimizer",
    "by_name",
    "is_scheduler",
    *_generated,
]


def __getattr__(name: str) -> Any:
    # Imported when first used: the core knows no worker and no network.
    if name in _DISTRIBUTED:
        return getattr(import_module("distopt.optim.distributed"), name)
    if name == "horovod":  # a module of pyro.optim, which that imports by itself
        return import_module("distopt.optim.horovod")
    raise AttributeError(f"module 'distopt.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

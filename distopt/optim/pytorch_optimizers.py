"""One function for each optimizer and scheduler of torch, and for Pyro's own: `Name(optim_args, clip_args=None)`.

The names are generated from the installed torch; `pytorch_optimizers.pyi` lists them for editors and type checkers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distopt.optim.adagrad_rmsprop import AdagradRMSProp as _AdagradRMSProp
from distopt.optim.arguments import Args
from distopt.optim.clipped_adam import ClippedAdam as _ClippedAdam
from distopt.optim.dct_adam import DCTAdam as _DCTAdam
from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim


def _optimizers() -> dict[str, Any]:
    found = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    for name in ("Optimizer", "LBFGS"):
        del found[name]
    return found | {"AdagradRMSProp": _AdagradRMSProp, "ClippedAdam": _ClippedAdam, "DCTAdam": _DCTAdam}


def _schedulers() -> dict[str, Any]:
    module = torch.optim.lr_scheduler
    base = module.LRScheduler
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and not name.startswith("_")
    } | {"ReduceLROnPlateau": module.ReduceLROnPlateau}


def _optimizer(name: str, constructor: Any) -> Callable[..., PyroOptim]:
    def make(optim_args: Args, clip_args: Args | None = None, **options: Any) -> PyroOptim:
        return PyroOptim(constructor, optim_args, clip_args, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Returns a `PyroOptim` of `{constructor.__module__}.{name}`."
    return make


def _scheduler(name: str, constructor: Any) -> Callable[..., PyroLRScheduler]:
    def make(optim_args: Mapping[str, Any], clip_args: Args | None = None, **options: Any) -> PyroLRScheduler:
        return PyroLRScheduler(constructor, optim_args, clip_args, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"Returns a `PyroLRScheduler` of `torch.optim.lr_scheduler.{name}`."
    return make


OPTIMIZERS = _optimizers()
SCHEDULERS = _schedulers()
globals().update({name: _optimizer(name, constructor) for name, constructor in OPTIMIZERS.items()})
globals().update({name: _scheduler(name, constructor) for name, constructor in SCHEDULERS.items()})

__all__ = sorted([*OPTIMIZERS, *SCHEDULERS])

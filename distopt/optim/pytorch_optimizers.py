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

_DOC = """Returns a `{kind}` of `{of}`.

Args:
    optim_args: {args}.
    clip_args: `clip_norm`, `clip_value` and `global_norm`, or a callable that returns them for a parameter's name.
    **options: `nonfinite` and `scaler`, see `PyroOptim`.
"""


def _keywords(constructor: Any) -> str:
    """The arguments of a class beyond what it steps or schedules, with their defaults."""
    names = list(inspect.signature(constructor).parameters.values())[1:]
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)).removeprefix("*") for p in names) or "none"


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
    args = f"{_keywords(constructor)}; or a callable that returns them for a parameter's name"
    make.__doc__ = _DOC.format(kind="PyroOptim", of=f"{constructor.__module__}.{name}", args=args)
    return make


def _scheduler(name: str, constructor: Any) -> Callable[..., PyroLRScheduler]:
    def make(optim_args: Mapping[str, Any], clip_args: Args | None = None, **options: Any) -> PyroLRScheduler:
        return PyroLRScheduler(constructor, optim_args, clip_args, **options)

    make.__name__ = make.__qualname__ = name
    args = f"`optimizer`, a torch class; `optim_args`, its arguments or such a callable; {_keywords(constructor)}"
    make.__doc__ = _DOC.format(kind="PyroLRScheduler", of=f"torch.optim.lr_scheduler.{name}", args=args)
    return make


OPTIMIZERS = _optimizers()
SCHEDULERS = _schedulers()
globals().update({name: _optimizer(name, constructor) for name, constructor in OPTIMIZERS.items()})
globals().update({name: _scheduler(name, constructor) for name, constructor in SCHEDULERS.items()})

__all__ = sorted([*OPTIMIZERS, *SCHEDULERS])

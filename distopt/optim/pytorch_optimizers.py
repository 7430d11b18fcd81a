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

Example:
    >>> import pyro, torch, distopt.optim
    >>> pyro.clear_param_store()
    >>> optim = distopt.optim.{name}({example})
    >>> x = pyro.param("x", torch.ones(2, 2)).unconstrained()
    >>> {backward}
    >>> optim([x])
"""

# What each needs beyond a learning rate; the generated docstrings are doctests, so every function runs once.
_INNER = '[("ConstantLR", {"total_iters": 5}), ("ExponentialLR", {"gamma": 0.9})]'
_EXAMPLES = {
    "AdagradRMSProp": '"eta": 0.1',
    "ChainedScheduler": f'"schedulers": {_INNER}',
    "CosineAnnealingLR": '"T_max": 100',
    "CosineAnnealingWarmRestarts": '"T_0": 10',
    "CyclicLR": '"base_lr": 1e-3, "max_lr": 1e-1, "cycle_momentum": False',
    "ExponentialLR": '"gamma": 0.99',
    "LambdaLR": '"lr_lambda": lambda step: 0.99**step',
    "MultiStepLR": '"milestones": [30, 80]',
    "MultiplicativeLR": '"lr_lambda": lambda step: 0.99',
    "OneCycleLR": '"max_lr": 0.1, "total_steps": 100',
    "ReduceLROnPlateau": '"patience": 5',
    "SequentialLR": f'"schedulers": {_INNER}, "milestones": [5]',
    "StepLR": '"step_size": 30',
}


def _keywords(constructor: Any) -> str:
    """The arguments of a class beyond what it steps or schedules, with their defaults."""
    names = list(inspect.signature(constructor).parameters.values())[1:]
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)).removeprefix("*") for p in names) or "none"


def _optimizers() -> dict[str, Any]:
    """Returns the optimizers of the installed torch, and Pyro's, by name."""
    classes = {
        name: value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }
    for name in ("Optimizer", "LBFGS"):  # a base class, and one that no step of SVI can serve
        del classes[name]
    return classes | {"AdagradRMSProp": _AdagradRMSProp, "ClippedAdam": _ClippedAdam, "DCTAdam": _DCTAdam}


def _schedulers() -> dict[str, Any]:
    """Returns the schedulers of the installed torch by name; `ReduceLROnPlateau` is none by type in some versions."""
    module = torch.optim.lr_scheduler
    base = module.LRScheduler
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and not name.startswith("_")
    } | {"ReduceLROnPlateau": module.ReduceLROnPlateau}


# The generated functions have docstrings with an example that is run, so that a torch whose optimizer takes other
# arguments is noticed. Type checkers cannot see them: tests/optim/test_pytorch_optimizers.py compares the stub file
# with what is generated.


def _optimizer(name: str, constructor: Any) -> Callable[..., PyroOptim]:
    def make(optim_args: Args, clip_args: Args | None = None, **options: Any) -> PyroOptim:
        return PyroOptim(constructor, optim_args, clip_args, **options)

    make.__name__ = make.__qualname__ = name
    args = f"{_keywords(constructor)}; or a callable that returns them for a parameter's name"
    sparse = name == "SparseAdam"
    make.__doc__ = _DOC.format(
        kind="PyroOptim",
        of=f"{constructor.__module__}.{name}",
        args=args,
        name=name,
        example="{" + _EXAMPLES.get(name, '"lr": 0.1') + "}",
        backward="x.grad = torch.ones(2, 2).to_sparse()" if sparse else "x.square().sum().backward()",
    )
    return make


def _scheduler(name: str, constructor: Any) -> Callable[..., PyroLRScheduler]:
    def make(optim_args: Mapping[str, Any], clip_args: Args | None = None, **options: Any) -> PyroLRScheduler:
        return PyroLRScheduler(constructor, optim_args, clip_args, **options)

    make.__name__ = make.__qualname__ = name
    args = f"`optimizer`, a torch class; `optim_args`, its arguments or such a callable; {_keywords(constructor)}"
    example = ['"optimizer": torch.optim.Adam', '"optim_args": {"lr": 0.1}', *filter(None, [_EXAMPLES.get(name)])]
    doc = _DOC.format(
        kind="PyroLRScheduler",
        of=f"torch.optim.lr_scheduler.{name}",
        args=args,
        name=name,
        example="{" + ", ".join(example) + "}",
        backward="x.square().sum().backward()",
    )
    step = "optim.step(metrics=1.0)" if name == "ReduceLROnPlateau" else "optim.step()"
    is_abstract = constructor is torch.optim.lr_scheduler.LRScheduler
    make.__doc__ = doc.partition("\nExample")[0] if is_abstract else f"{doc}    >>> {step}\n"
    return make


OPTIMIZERS = _optimizers()
SCHEDULERS = _schedulers()
globals().update({name: _optimizer(name, constructor) for name, constructor in OPTIMIZERS.items()})
globals().update({name: _scheduler(name, constructor) for name, constructor in SCHEDULERS.items()})

globals()["_LRScheduler"] = globals()["LRScheduler"]  # its name in older versions of torch, and in pyro.optim

__all__ = sorted([*OPTIMIZERS, *SCHEDULERS])

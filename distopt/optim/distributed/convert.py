"""Optimizers of `pyro.optim` as those of distopt, and copies of either."""

from __future__ import annotations

from typing import Any

import pyro.optim
import torch

from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim

_STEPPING = ("__call__", "step", "_get_optim", "_get_optim_args", "_get_grad_clip", "_get_grad_clip_args", "_clip_grad")


def from_pyro(optim: pyro.optim.optim.PyroOptim) -> PyroOptim:
    """Returns an optimizer that continues as `optim` would: with its arguments, and the state it has loaded or built.

    Args:
        optim: An optimizer of `pyro.optim`, which is left as it is; one of distopt is returned itself.

    Raises:
        TypeError: It is neither, or of a class that takes its steps in another way.
    """
    if isinstance(optim, PyroOptim):
        return optim
    if not isinstance(optim, pyro.optim.optim.PyroOptim):
        is_made = not callable(optim) or isinstance(optim, torch.optim.Optimizer)
        described = f"an object of {type(optim)}" if is_made else str(optim)
        raise TypeError(
            f"found {described}, expected an optimizer of distopt.optim or pyro.optim, such as Adam({{'lr': 0.01}})."
        )
    check_stepping(optim)

    if isinstance(optim, pyro.optim.PyroLRScheduler):
        arguments = {"optimizer": optim.pt_optim_constructor, "optim_args": optim.pt_optim_args, **optim.kwargs}
        converted: PyroOptim = PyroLRScheduler(optim.pt_scheduler_constructor, arguments, optim.pt_clip_args)
    else:
        converted = PyroOptim(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
    # What pyro.optim has loaded waits until its parameter is first stepped, and get_state() leaves it out until then.
    converted.set_state({**optim.get_state(), **optim._state_waiting_to_be_consumed})
    return converted


def copy_of(optim: pyro.optim.optim.PyroOptim) -> PyroOptim:
    """Returns another optimizer that continues as `optim` would, and shares no state with it.

    Raises:
        TypeError: As `from_pyro`.
    """
    if not isinstance(optim, PyroOptim):
        return from_pyro(optim)
    check_stepping(optim)
    options: dict[str, Any] = {"nonfinite": optim.nonfinite, "scaler": optim.scaler}
    if isinstance(optim, PyroLRScheduler):
        arguments = {"optimizer": optim.pt_optim_constructor, "optim_args": optim.pt_optim_args, **optim.kwargs}
        copied: PyroOptim = PyroLRScheduler(optim.pt_scheduler_constructor, arguments, optim.pt_clip_args, **options)
    else:
        copied = PyroOptim(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args, **options)
    copied.set_state(optim.get_state())
    take_counts_(copied, optim)
    return copied


def take_counts_(optim: PyroOptim, other: PyroOptim) -> None:
    """Gives `optim` what `other`, of its kind, has counted and is not in `get_state`, to continue in its place."""
    optim.nonfinite = other.nonfinite
    optim.num_skipped_steps = other.num_skipped_steps
    optim.nonfinite_names = other.nonfinite_names
    if isinstance(optim, PyroLRScheduler) and isinstance(other, PyroLRScheduler):
        optim.num_steps = other.num_steps


def check_stepping(optim: pyro.optim.optim.PyroOptim) -> None:
    """Refuses an optimizer whose class takes steps in another way, which an optimizer of distopt would not do.

    Raises:
        TypeError: A class of the user's, or Pyro's `HorovodOptimizer`, overrides a method that takes part in a step.
    """
    for cls in type(optim).__mro__:
        if cls in (pyro.optim.optim.PyroOptim, pyro.optim.PyroLRScheduler, PyroOptim, PyroLRScheduler):
            return
        overridden = [name for name in _STEPPING if name in vars(cls)]
        if overridden:
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__} overrides {', '.join(overridden)} of PyroOptim, and a "
                "distributed optimizer would not call it. Put what it does into a torch optimizer, and give that class "
                "to distopt.optim.PyroOptim; of an optimizer that averages by itself, give the one that it wraps."
            )

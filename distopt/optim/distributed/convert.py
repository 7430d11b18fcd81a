"""Optimizers of `pyro.optim` as those of distopt."""

from __future__ import annotations

import pyro.optim
import torch

from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim


def from_pyro(optim: pyro.optim.PyroOptim) -> PyroOptim:
    """Returns an optimizer that continues as `optim` would: with its arguments, and the state it has loaded or built.

    Args:
        optim: An optimizer of `pyro.optim`, which is left as it is; one of distopt is returned itself.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(optim, PyroOptim):
        return optim
    if not isinstance(optim, pyro.optim.PyroOptim):
        is_made = not callable(optim) or isinstance(optim, torch.optim.Optimizer)
        described = f"an object of {type(optim)}" if is_made else str(optim)
        raise TypeError(
            f"found {described}, expected an optimizer of distopt.optim or pyro.optim, such as Adam({{'lr': 0.01}})."
        )

    if isinstance(optim, pyro.optim.PyroLRScheduler):
        arguments = {"optimizer": optim.pt_optim_constructor, "optim_args": optim.pt_optim_args, **optim.kwargs}
        converted: PyroOptim = PyroLRScheduler(optim.pt_scheduler_constructor, arguments, optim.pt_clip_args)
    else:
        converted = PyroOptim(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
    # What pyro.optim has loaded waits until its parameter is first stepped, and get_state() leaves it out until then.
    converted.set_state({**optim.get_state(), **optim._state_waiting_to_be_consumed})
    return converted

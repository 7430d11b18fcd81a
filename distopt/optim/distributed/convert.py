"""Optimizers of `pyro.optim` as those of distopt."""

from __future__ import annotations

import pyro.optim

from distopt.optim.lr_scheduler import PyroLRScheduler
from distopt.optim.optim import PyroOptim


def as_ours(optim: pyro.optim.PyroOptim) -> PyroOptim:
    """Returns an optimizer of `pyro.optim` as one of ours, with the state it has loaded or built up."""
    if isinstance(optim, PyroOptim):
        return optim
    if not isinstance(optim, pyro.optim.PyroOptim):
        raise TypeError(f"{optim!r} is no PyroOptim. Give an optimizer of distopt.optim or pyro.optim.")
    if isinstance(optim, pyro.optim.PyroLRScheduler):
        arguments = {"optimizer": optim.pt_optim_constructor, "optim_args": optim.pt_optim_args, **optim.kwargs}
        ours: PyroOptim = PyroLRScheduler(optim.pt_scheduler_constructor, arguments, optim.pt_clip_args)
    else:
        ours = PyroOptim(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
    ours.set_state({**optim.get_state(), **optim._state_waiting_to_be_consumed})
    return ours

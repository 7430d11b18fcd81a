"""Optimizers of `pyro.optim` as those of distopt."""

from __future__ import annotations

import pyro.optim

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
        raise TypeError(f"found {optim!r}, expected an optimizer of distopt.optim or pyro.optim.")

    if isinstance(optim, pyro.optim.PyroLRScheduler):
        arguments = {"optimizer": optim.pt_optim_constructor, "optim_args": optim.pt_optim_args, **optim.kwargs}
        converted: PyroOptim = PyroLRScheduler(optim.pt_scheduler_constructor, arguments, optim.pt_clip_args)
    else:
        converted = PyroOptim(optim.pt_optim_constructor, optim.pt_optim_args, optim.pt_clip_args)
    # What pyro.optim has loaded waits until its parameter is first stepped, and get_state() leaves it out until then.
    converted.set_state({**optim.get_state(), **optim._state_waiting_to_be_consumed})
    return converted

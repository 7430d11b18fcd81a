"""What distopt changes in Pyro: the few methods in which one rank alone would do the wrong thing, silently.

Pyro's `SVI.step` computes a gradient before it calls the optimizer, so an optimizer alone comes too late: it can
neither see to equal first values and independent noise, nor tell the other ranks that the model has raised. And an
optimizer that is not distributed, in a world of several ranks, steps each rank by its own gradient. Both are settled in
these methods, which are replaced once: when a world of several ranks is joined, or the first `DistributedOptimizer` is
made. In a world of one they do what Pyro's do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Protocol

import pyro.infer
import pyro.infer.mcmc
import pyro.optim
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.optim.horovod import HorovodOptimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distopt.backends import joined_world
from distopt.optim.capabilities import name_of
from distopt.optim.distributed.laplace import laplace_approximation
from distopt.optim.distributed.optimizer import DistributedOptimizer
from distopt.optim.distributed.svi_step import LossAndParams, step_on_all_ranks
from distopt.optim.optim import PyroOptim


class Adopter(Protocol):
    """Makes what steps inside `everywhere()` distributed."""

    def adopt_svi(self, svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossAndParams | None:
        """Adopts an SVI that is about to step with these arguments; returns what computes its gradients, if not it."""

    def adopt_optimizer(self, optim: pyro.optim.PyroOptim) -> None:
        """Adopts an optimizer that is about to step."""


_adopters: list[Adopter] = []
_warned: set[str] = set()
_installed: list[bool] = []


def begin_adopting(adopter: Adopter) -> None:
    """Lets `adopter` see every SVI and optimizer before it steps, until `end_adopting`; the last one begun does."""
    install()
    _adopters.append(adopter)


def end_adopting(adopter: Adopter) -> None:
    """Ends what `begin_adopting` began."""
    _adopters.remove(adopter)


def offer_svi(svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> LossAndParams | None:
    """Lets `everywhere()` adopt an SVI that is about to step; does nothing outside.

    Returns:
        What computes the loss and the gradients of its steps; None for the SVI itself.
    """
    return _adopters[-1].adopt_svi(svi, args, kwargs) if _adopters else None


def install() -> None:
    """Replaces the methods, once in a process."""
    if _installed:
        return
    _installed.append(True)
    _replace(pyro.infer.SVI, "step", _svi_step)
    for cls in (pyro.optim.PyroOptim, PyroOptim):
        _replace(cls, "__call__", _optimizer_call)
    _replace(AutoLaplaceApproximation, "laplace_approximation", _laplace_approximation)
    for cls in (pyro.infer.MCMC, pyro.infer.mcmc.StreamingMCMC, pyro.infer.Importance):
        _replace(cls, "run", _of_one_rank)
    _replace(pyro.infer.WeighedPredictive, "forward", _of_one_rank)  # which `call` calls
    register_optimizer_step_pre_hook(_before_torch_step)


def _replace(cls: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(cls, name)
    setattr(cls, name, wraps(original)(make(original)))


def _svi_step(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(svi: pyro.infer.SVI, *args: Any, **kwargs: Any) -> Any:
        gradients = offer_svi(svi, args, kwargs)
        if isinstance(svi.optim, DistributedOptimizer):
            zero_grads = pyro.infer.util.zero_grads if gradients is None else svi.optim.zero_grad
            info = step_on_all_ranks(svi, args, kwargs, gradients, zero_grads)
            return info.losses if len(info.losses) > 1 else info.losses[0]
        return original(svi, *args, **kwargs)

    return step


def _optimizer_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(optim: pyro.optim.PyroOptim, params: Any, *args: Any, **kwargs: Any) -> None:
        if _adopters and not isinstance(optim, HorovodOptimizer):
            _adopters[-1].adopt_optimizer(optim)
            optim(params, *args, **kwargs)
            return
        _warn_of_plain_optimizer(optim)
        original(optim, params, *args, **kwargs)

    return call


def _laplace_approximation(original: Callable[..., Any]) -> Callable[..., Any]:
    def approximate(guide: AutoLaplaceApproximation, *args: Any, **kwargs: Any) -> Any:
        world = joined_world()
        if world is None or world.world_size == 1:
            return original(guide, *args, **kwargs)
        return laplace_approximation(guide, *args, backend=world, **kwargs)

    return approximate


def _of_one_rank(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(inference: Any, *args: Any, **kwargs: Any) -> Any:
        name = type(inference).__name__
        _warn_once(
            f"{name} is not collective: each of the {{world_size}} ranks computes it from the arguments that it was "
            "given. If these are a rank's rows, the result is not that of all the data: run it on one rank with all "
            "rows. If every rank has all rows, each has a result, or chains, of its own."
        )
        return original(inference, *args, **kwargs)

    return run


def _before_torch_step(optim: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Warns of a torch optimizer that Pyro's library steps by a closure, as `pyro.contrib.gp.util.train` does."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None and not _adopters and str(getattr(closure, "__module__", "")).startswith("pyro."):
        _warn_of_plain_optimizer(optim)


def _warn_of_plain_optimizer(optim: Any) -> None:
    if isinstance(optim, HorovodOptimizer):
        return  # Pyro's, which averages by itself
    if isinstance(optim, pyro.optim.PyroOptim):
        name = name_of(optim.pt_optim_constructor)
        remedy = (
            f"Write DistributedOptimizer({name}(...)), from distopt.optim; or, where a library makes the optimizer, "
            "`with distopt.infer.everywhere():` around its call."
        )
    else:
        name = type(optim).__name__
        remedy = "Write `with distopt.infer.everywhere():` around the call that makes it."
    _warn_once(
        f"the optimizer {name} is not distributed: each of the {{world_size}} ranks steps by its own gradients alone, "
        f"so their parameters drift apart. {remedy}"
    )


def _warn_once(text: str) -> None:
    """Warns if this process is one of several ranks."""
    world = joined_world()
    if text in _warned or world is None or world.world_size == 1:
        return
    _warned.add(text)
    warnings.warn(f"rank {world.rank}: {text.format(world_size=world.world_size)}", stacklevel=4)

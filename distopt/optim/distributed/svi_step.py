"""One gradient step of an SVI on all ranks: they meet before the first one, and an error on one rank reaches all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pyro.infer
import pyro.infer.util
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceTailAdaptive_ELBO
from pyro.infer.util import torch_item
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distopt.optim.amp import WrappedELBO
from distopt.optim.distributed.optimizer import DistributedOptimizer
from distopt.optim.distributed.stepping import Loss, StepInfo, numbers_of
from distopt.reduce.model_survey import ModelSurvey
from distopt.rng import generators_state, set_generators_state

LossAndParams = Callable[[Sequence[Any], Mapping[str, Any]], tuple[Loss, Iterable[Tensor]]]
"""Computes a loss and its gradients, given the arguments of model and guide; returns it and the parameters."""


def step_on_all_ranks(
    svi: pyro.infer.SVI,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss_and_params: LossAndParams | None = None,
    zero_grads: Callable[[Iterable[Tensor]], None] = pyro.infer.util.zero_grads,
    **shared: Any,
) -> StepInfo:
    """Takes one gradient step of an SVI whose optimizer is a `DistributedOptimizer`; a collective call.

    Args:
        svi: The SVI: Pyro's or a subclass.
        args: Arguments of model and guide.
        kwargs: Their keyword arguments.
        loss_and_params: Computes the gradients; None for the SVI's `loss_and_grads`.
        zero_grads: Clears them after the step.
        **shared: `step`, `stop` and `measure_norm` of `DistributedOptimizer.step_with`.

    Returns:
        What the ranks have learned from each other; its losses are this rank's own when the call only added gradients
        to those of the next one.

    Raises:
        Exception: What model or guide raised on this rank; no rank has stepped.
        PeerError: Model or guide raised on another rank; no rank has stepped.
    """
    optim: DistributedOptimizer = svi.optim
    # A model that raises on one rank, or ends its process, would leave the others waiting in the all-reduce: they are
    # told first. They are not told of Ctrl-C, which has to end a process at once, whether the others answer or not.
    try:
        if not optim.is_synchronized:
            meet(svi, args, kwargs)
        loss, params = (loss_and_params or partial(loss_and_named_params, svi))(args, kwargs)
        numbers = numbers_of(loss)
    except (Exception, SystemExit) as error:
        optim.abort(error)
        raise

    info = optim.step_with(params, loss=loss, **shared)
    zero_grads(params)
    return info if info.loss is not None else replace(info, loss=numbers[0], losses=numbers)


def loss_and_named_params(
    svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Loss, list[Tensor]]:
    """Computes the loss and its gradients, as Pyro's SVI does, and returns the loss and the parameters it named."""
    with poutine.trace(param_only=True) as capture:
        loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
    # In the order of the model and not of a set, which would differ from one run of a process to the next.
    params = list(dict.fromkeys(site["value"].unconstrained() for site in capture.trace.nodes.values()))
    return tuple(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss), params


def run_once(svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Runs guide and model once, so that their parameters exist; computes no gradient."""
    loss = svi.loss
    elbo = getattr(loss, "__self__", None)
    while isinstance(elbo, WrappedELBO):
        elbo = elbo.elbo
    # This objective has only a gradient, its `loss` raises.
    if isinstance(elbo, TraceTailAdaptive_ELBO):
        loss = partial(Trace_ELBO.loss, elbo)
    loss(svi.model, svi.guide, *args, **kwargs)


def meet(svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Agrees on the first values of the parameters before a gradient is computed from them.

    Random generators and the buffers of modules are as before, so that the first step is what it would be on a single
    rank; from then on the ranks' generators differ, unless the optimizer shares its noise.
    """
    optim: DistributedOptimizer = svi.optim
    device = optim.backend.device
    state = generators_state(device)
    survey = ModelSurvey()
    with preserving_buffers(), poutine.trace(param_only=True) as capture, survey:
        run_once(svi, args, kwargs)
    set_generators_state(state, device)

    optim.reducer.model_survey = survey.describe()
    optim.synchronize({site["value"].unconstrained() for site in capture.trace.nodes.values()})


@contextmanager
def preserving_buffers() -> Iterator[None]:
    """Puts back the buffers of all modules that are called meanwhile, such as batch norm's running statistics."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, _args: Any) -> None:
        for buffer in module.buffers(recurse=False):
            kept.setdefault(id(buffer), (buffer, buffer.detach().clone()))

    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, values in kept.values():
                buffer.copy_(values)

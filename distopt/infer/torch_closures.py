"""Torch optimizers that are stepped with a closure, as `pyro.contrib.gp.util.train` does it, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distopt.backends import Backend, current
from distopt.reduce import DisagreementError
from distopt.reduce.agreement import share_values_
from distopt.rng import generator_digest, separate_streams


@contextmanager
def averaging_closures(backend: Backend | None = None) -> Iterator[None]:
    """Averages, over the ranks, gradients and loss of every torch optimizer that is stepped with a closure inside.

    In the first step of an optimizer all ranks take rank 0's parameters, and draw different noise from then on.

    Args:
        backend: Link to the other ranks; None for the current one.
    """
    met: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()

    def before_step(optim: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        world = backend or current()
        if closure is None or world.world_size == 1:
            return None
        params = [param for group in optim.param_groups for param in group["params"]]
        if optim not in met:
            _meet(world, params)
            met[optim] = True
        rest = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], lambda: _average_(world, closure, params), *args[2:]), rest

    handle = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        handle.remove()


def _meet(backend: Backend, params: list[Tensor]) -> None:
    """Compares the parameters' shapes, gives all ranks rank 0's values, and separates the ranks' noise."""
    mine = {"params": [[list(param.shape), str(param.dtype)] for param in params], "rng": generator_digest()}
    by_rank = backend.all_gather_json(mine)
    for rank, each in enumerate(by_rank):
        if each["params"] != by_rank[0]["params"]:
            raise DisagreementError(
                f"rank {backend.rank} of {backend.world_size}: a torch optimizer steps parameters of other shapes on "
                f"rank {rank} than on rank 0: {each['params']}, expected {by_rank[0]['params']}."
            )
    for tensors in by_kind(params):
        share_values_(backend, tensors, owner=0)
    separate_streams([each["rng"] for each in by_rank], backend.rank)


def _average_(backend: Backend, closure: Callable[[], Any], params: list[Tensor]) -> Any:
    """Calls the closure and returns its loss, averaged over the ranks; so are the gradients that it leaves."""
    try:
        loss = closure()
    except Exception as error:
        backend.fail(error)  # the others wait for this rank's gradients, and now raise this cause
        raise

    mean = torch.as_tensor(loss).detach().clone().reshape(1)
    average_gradients_(backend, params, mean)
    return mean.reshape(()) if isinstance(loss, Tensor) else float(mean)


def average_gradients_(backend: Backend, params: Sequence[Tensor], *values: Tensor) -> None:
    """Replaces the gradients of `params`, and `values`, by their means over the ranks.

    A gradient that a rank lacks counts as zero; one that all ranks lack stays missing, as in one process.

    Args:
        backend: Link to the other ranks.
        params: The same ones on all ranks.
        *values: Further tensors, overwritten.

    Cost:
        An all-reduce of a number for each parameter, and one for each dtype and device.
    """
    if backend.world_size == 1:
        return
    with torch.no_grad():
        present = torch.tensor([float(param.grad is not None) for param in params])
        backend.all_reduce(present).wait()
        touched = [param for param, count in zip(params, present.tolist(), strict=True) if count]
        for param in touched:
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad.contiguous()
        means = [gradient for param in touched if (gradient := param.grad) is not None]
        for tensors in by_kind([*means, *values]):
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            backend.all_reduce(flat).wait()
            flat /= backend.world_size
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, mean in zip(tensors, torch.split(flat, sizes), strict=True):
                tensor.copy_(mean.view_as(tensor))


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Returns the tensors in lists of one dtype and device."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())

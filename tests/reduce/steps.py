"""What bodies of tests share: steps with given gradients, and values to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import DistributedOptimizer, StepInfo

Values = dict[str, Any]


def store_values() -> Values:
    """This rank's unconstrained parameters, exactly."""
    named = pyro.get_param_store().named_parameters()
    return {name: torch.view_as_real(p).tolist() if p.is_complex() else p.tolist() for name, p in sorted(named)}


def step_with(optim: DistributedOptimizer, gradients: Mapping[str, Tensor | None], **shared: Any) -> StepInfo:
    """One optimizer call as SVI makes it: a set of parameters with gradients, replaced by zeros afterwards."""
    params = set()
    for name, gradient in gradients.items():
        param = pyro.param(name).unconstrained()
        param.grad = gradient
        params.add(param)
    info = optim.step_with(params, **shared)
    for param in params:
        if param.grad is not None:
            param.grad = torch.zeros_like(param.grad)
    return info


def random_values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unconstrained(name: str) -> Tensor:
    """A detached copy of a parameter's unconstrained value."""
    return pyro.param(name).unconstrained().detach().clone()


def by_rank(step: int, *shape: int) -> list[Tensor]:
    """One gradient for each rank."""
    return [random_values(1000 * step + rank, *shape) for rank in range(current().world_size)]


@contextmanager
def counting_calls() -> Iterator[list[tuple[str, int]]]:
    """Yields the collectives that reach this rank's backend meanwhile: name and number of elements."""
    backend = current()
    calls: list[tuple[str, int]] = []
    is_within = False

    def counted(method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_within
            if not is_within:  # a backend may do one by another
                calls.append(("all_reduce" if method == "sum_buffer" else method, tensor.numel()))
            before, is_within = is_within, True
            try:
                return call(tensor, *args, **kwargs)
            finally:
                is_within = before

        return count

    methods = ("sum_buffer", "all_reduce", "broadcast", "all_gather", "send_recv")
    for method in methods:
        setattr(backend, method, counted(method, getattr(backend, method)))
    try:
        yield calls
    finally:
        for method in methods:
            delattr(backend, method)

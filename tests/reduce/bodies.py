"""What one rank does in the reducer's tests; each body compares with a plain reference and returns what all must share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from distopt.backends import current
from distopt.optim import SGD, Adam, DistributedOptimizer, PyroOptim
from distopt.reduce import DisagreementError, PeerError

Values = dict[str, list[Any]]


def store_values() -> Values:
    """This rank's unconstrained parameters, exactly."""
    named = pyro.get_param_store().named_parameters()
    return {name: torch.view_as_real(p).tolist() if p.is_complex() else p.tolist() for name, p in sorted(named)}


def step_with(optim: PyroOptim, gradients: Mapping[str, Tensor | None]) -> None:
    """One optimizer call as SVI makes it: a set of parameters with gradients, replaced by zeros afterwards."""
    params = set()
    for name, gradient in gradients.items():
        param = pyro.param(name).unconstrained()
        param.grad = gradient
        params.add(param)
    optim(params)
    for param in params:
        if param.grad is not None:
            param.grad = torch.zeros_like(param.grad)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def averages_gradients() -> Values:
    """Two parameters on all ranks: equals torch's own SGD on the mean gradient."""
    rank, size = current().rank, current().world_size
    optim = DistributedOptimizer(SGD({"lr": 0.1}))
    pyro.param("b", torch.zeros(3))
    pyro.param("a", torch.ones(2, 2), constraint=constraints.positive)
    reference = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    for step in range(3):
        gradients = {
            each: {"a": noise(100 * step + each, 2, 2), "b": noise(100 * step + each + 50, 3)} for each in range(size)
        }
        step_with(optim, gradients[rank])
        for name, value in reference.items():
            value -= 0.1 * sum(gradients[each][name] for each in range(size)) / size
            torch.testing.assert_close(pyro.param(name).unconstrained().detach(), value)
    assert optim.num_active == size
    return store_values()

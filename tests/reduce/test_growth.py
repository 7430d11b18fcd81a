"""What ranks tell each other of parameters that appear one a step follows from what is new, not from what there is."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from distopt.backends import current
from distopt.optim import SGD, DistributedOptimizer
from tests.workers import world


def _run_births(number: int) -> list[int]:
    """Bytes that this rank gives to collectives in each step, of which each brings a parameter of one element."""
    backend: Any = current()
    sizes: list[int] = []

    start = backend._start

    def counted(what: str, tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes[-1] += tensor.nbytes
        return start(what, tensor, *args, **options)

    backend._start = counted
    try:
        optim, params = DistributedOptimizer(SGD({"lr": 0.1})), []
        for index in range(number):
            sizes.append(0)
            params.append(pyro.param(f"p{index * 7919 % 100_003:06d}", torch.ones(1)).unconstrained())
            for param in params:
                param.grad = torch.ones_like(param)
            optim(params)
    finally:
        del backend._start
    return sizes


def test_bytes_of_an_agreement_do_not_grow_with_the_parameters_that_are_known() -> None:
    for sizes in world("torch_dist", 2).run(_run_births, 300):
        # Each step sends the gradient of each known parameter, 4 bytes, and at most as much again to say who has one.
        per_param = [(late - early) / 200 for early, late in zip(sizes[40:100], sizes[240:], strict=True)]
        assert 4 <= min(per_param) and max(per_param) <= 8
        assert max(sizes[:40]) < 8192  # the names, shapes and kinds of what is new

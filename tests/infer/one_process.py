"""The ranks of a world one after another in one process, to compare their mean with Pyro's own gradient of all data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pyro
import torch
from torch import Tensor

from distopt.sharding import LocalParameter, local_parameter


@contextmanager
def same_draws() -> Iterator[None]:
    """Float64, and 0.3 in place of each standard normal number, so that one process and many draw alike."""

    def constant(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.full(tuple(shape), 0.3, dtype=dtype, device=device)

    patches = [
        patch("torch.distributions.normal._standard_normal", constant),
        patch("torch.distributions.multivariate_normal._standard_normal", constant),
        patch.object(Tensor, "float", Tensor.double),  # cell2location makes some of its arguments float32
    ]
    torch.set_default_dtype(torch.float64)
    try:
        with ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass
class Gradients:
    """A loss, and the gradient of each parameter by name; those of datapoints have the datapoints first."""

    loss: float
    by_name: dict[str, Tensor]


def gradients_of_ranks(run: Callable[[Any], float], shards: Sequence[Any]) -> Gradients:
    """Runs `run(shard)` (loss and backward) for each shard with its own store, and combines as the reducer does.

    The replicated gradients are averaged over the ranks, the local ones divided by the number of ranks and laid end to
    end.
    """
    losses: list[float] = []
    replicated: dict[str, list[Tensor]] = {}
    local: dict[str, list[Tensor]] = {}
    store = pyro.get_param_store()
    for shard in shards:
        store.clear()
        losses.append(run(shard))
        for name, param in store.named_parameters():
            entry = local_parameter(param)
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            if entry is None:
                replicated.setdefault(name, []).append(grad)
            else:
                assert entry.plate.num_shards == len(shards)
                local.setdefault(name, []).append(entry.by_row(grad) / len(shards))
    combined = {name: torch.stack(grads).mean(0) for name, grads in replicated.items()}
    combined |= {name: torch.cat(grads) for name, grads in local.items()}
    return Gradients(sum(losses) / len(losses), combined)


def gradients_of_all(run: Callable[[Any], float], data: Any, entries: dict[str, LocalParameter]) -> Gradients:
    """Runs `run(data)` once with a store of its own; gradients of parameters in `entries` get the datapoints first."""
    store = pyro.get_param_store()
    store.clear()
    loss = run(data)
    grads = {}
    for name, param in store.named_parameters():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        if name in entries:
            dim, shape = entries[name].dim, list(entries[name].shape)
            shape[dim] = -1
            grad = grad.reshape(shape).movedim(dim, 0)
        grads[name] = grad
    return Gradients(loss, grads)


def assert_same(actual: Gradients, expected: Gradients, relative: float = 1e-10) -> None:
    """Asserts equal losses and gradients."""
    assert abs(actual.loss - expected.loss) <= relative * abs(expected.loss)
    assert actual.by_name.keys() == expected.by_name.keys()
    for name, grad in expected.by_name.items():
        torch.testing.assert_close(
            actual.by_name[name], grad, rtol=relative, atol=relative, msg=lambda m, n=name: f"{n}: {m}"
        )

"""Higher-order optimizers over all workers: gradients and Hessians are averaged before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distopt.backends import Backend, current
from distopt.optim.multi import MixedMultiOptimizer, MultiOptimizer
from distopt.reduce.errors import DisagreementError


class DistributedMultiOptimizer(MultiOptimizer):
    """A `MultiOptimizer` whose gradients and Hessians are means over all ranks, so that ranks equal one with all data.

    Every rank gives the same parameters with equal values, in any order. What `get_step` returns has the value that all
    ranks share and the derivatives of this rank's own term of the loss.

    Args:
        optim: `Newton`, `PyroMultiOptimizer`, `TorchMultiOptimizer` or a mixture of them.
        backend: Link to the other ranks; `distopt.backends.current()` at the first step when None.

    Raises:
        DisagreementError: Ranks gave parameters of other names or shapes; nothing was stepped.

    Cost:
        A small gather of names, and one all-reduce for each gradient and Hessian.

    Example:
        >>> from distopt.optim import Newton
        >>> x = torch.tensor([[3.0, -1.0]], requires_grad=True)
        >>> DistributedMultiOptimizer(Newton()).step(((x - 1.0) ** 2).sum(), {"x": x})
        >>> x.detach()
        tensor([[1., 1.]])
    """

    def __init__(self, optim: MultiOptimizer, *, backend: Backend | None = None) -> None:
        self.optim = optim
        self._backend = backend
        _set_reduce(optim, self._mean)

    def step(self, loss: Tensor, params: Mapping[str, Tensor]) -> None:
        """Updates `params` in place; a collective call."""
        self.optim.step(loss, self._agree_on(params))

    def get_step(self, loss: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the updated values, differentiable; a collective call."""
        return self.optim.get_step(loss, self._agree_on(params))

    def _agree_on(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the parameters in one order on all ranks, so that their all-reduces are paired rightly."""
        backend = self._backend = self._backend or current()
        shapes = backend.all_gather_json({name: list(params[name].shape) for name in sorted(params)})
        for rank, each in enumerate(shapes):
            if each != shapes[0]:
                raise DisagreementError(
                    f"rank {backend.rank} of {backend.world_size}: parameters differ: rank 0 gives {shapes[0]}, rank "
                    f"{rank} gives {each}. Every rank must give the same ones."
                )
        return {name: params[name] for name in sorted(params)}

    def _mean(self, values: Tensor) -> Tensor:
        mean: Tensor = _Mean.apply(values, self._backend)  # type: ignore[no-untyped-call]
        return mean


class _Mean(torch.autograd.Function):
    """The mean over ranks, bit by bit the same on all; its derivative is that of this rank's value."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, backend: Backend) -> Tensor:
        mean = values.detach().clone(memory_format=torch.contiguous_format)
        backend.all_reduce(mean).wait()
        return mean.div_(backend.world_size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _set_reduce(optim: MultiOptimizer, reduce: object) -> None:
    optim.reduce = reduce  # type: ignore[assignment]
    for _, member in optim.parts if isinstance(optim, MixedMultiOptimizer) else ():
        _set_reduce(member, reduce)

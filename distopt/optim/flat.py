"""Gradients of many parameters side by side in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class FlatGradients:
    """Gradients of several dense parameters of one dtype and device side by side in one 1-D buffer.

    Attributes:
        names: parameter-store names, one per parameter.
        params: the unconstrained leaf tensors, in the order of `names`.
        buffer: shape (sum of numels,), dtype of the parameters; the gradients in that order, each in row-major order.
            Whoever receives it may overwrite it.

    The steady state is recognised by the identity of the `params` tuple: hand over the same tuple object each step.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    buffer: Tensor

    def offsets(self) -> list[int]:
        """Returns where each gradient starts in `buffer`, and at last where the last one ends."""
        return list(accumulate((p.numel() for p in self.params), initial=0))


def copy_into(buffer: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int] | None = None) -> None:
    """Copies dense `tensors` one behind the other into the 1-D `buffer`, whose length is the sum of theirs."""
    if all(t.dim() == 1 for t in tensors):
        torch.cat(list(tensors), out=buffer)
        return
    start = 0
    for t in tensors:
        end = start + t.numel()
        buffer[start:end].view(t.shape).copy_(t)
        start = end


def pack(named: Sequence[tuple[str, Tensor]], buffer: Tensor | None = None) -> FlatGradients:
    """Copies the gradients of `named` into one buffer, in the given order.

    Args:
        named: (name, parameter) pairs of one dtype and device, each with a dense gradient.
        buffer: shape (sum of numels,), overwritten when given; a new one otherwise.

    Returns:
        The packed gradients.

    Raises:
        ValueError: when a parameter has no gradient, a sparse one, or another dtype or device than the first.

    Example:
        >>> x, y = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
        >>> (x.sum() + 3 * y).backward()
        >>> pack([("x", x), ("y", y)]).buffer
        tensor([1., 1., 3.])
    """
    if not named:
        raise ValueError("pack: no parameters given, expected at least one (name, parameter) pair.")
    first = named[0][1]
    for name, p in named:
        if p.grad is None or p.grad.layout is not torch.strided:
            found = "no gradient" if p.grad is None else f"a gradient of layout {p.grad.layout}"
            raise ValueError(f"pack: parameter {name!r} has {found}, expected a dense one; pass it as loose instead.")
        if p.dtype != first.dtype or p.device != first.device:
            raise ValueError(
                f"pack: parameter {name!r} is {p.dtype} on {p.device}, {named[0][0]!r} is {first.dtype} on "
                f"{first.device}; pack each dtype and device by itself."
            )
    params = tuple(p for _, p in named)
    if buffer is None:
        buffer = first.new_empty(sum(p.numel() for p in params), requires_grad=False)
    with torch.no_grad():
        copy_into(buffer, [p.grad for p in params if p.grad is not None])
    return FlatGradients(tuple(name for name, _ in named), params, buffer)

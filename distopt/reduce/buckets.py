"""How a rank's gradients get into the buckets."""

from __future__ import annotations

from collections.abc import Iterable
from operator import eq
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distopt.reduce.layout import LARGE_NUMEL, Bucket, Layout
from distopt.reduce.messages import Brought


@torch.no_grad()
def fill_bucket_(bucket: Bucket, brought: Brought | None, scale: float) -> None:
    """Overwrites a bucket with this rank's gradients times `scale`, and zeros where it has none."""
    if brought is None:
        bucket.buffer.zero_()
        return
    gradients = list(map(brought.gradients.__getitem__, bucket.indices))
    if brought.complete and gradients and not bucket.is_large:
        if bucket.is_1d:
            torch.cat(gradients, out=bucket.flat)  # type: ignore[arg-type]  # none is None
        else:
            torch._foreach_copy_(bucket.views, gradients)  # type: ignore[arg-type]
        if scale != 1.0:
            bucket.flat.mul_(scale)
        return
    for view, gradient in zip(bucket.views, gradients, strict=True):
        if gradient is None:
            view.zero_()
        else:
            torch.mul(gradient.to_dense() if gradient.is_sparse else gradient, scale, out=view)


@torch.no_grad()
def take_out_(layout: Layout, brought: Brought) -> None:
    """Gives each parameter whose gradient lies in a bucket a copy of it.

    The optimizer leaves views of the buckets as gradients; where they are zeroed in place, the next ones gather there.
    A round may overwrite the buckets and then find that it has to be made again.
    """
    for param, gradient in brought.news.values():
        if gradient is not None and layout.params:
            param.grad = gradient.clone()
    gradients = brought.gradients
    addresses = brought.addresses or list(map(_address, gradients))
    for bucket in layout.buckets:
        own = list(map(addresses.__getitem__, bucket.indices))
        if not any(map(eq, own, bucket.addresses)):
            continue
        for index, address, there in zip(bucket.indices, own, bucket.addresses, strict=True):
            gradient = gradients[index]
            if address == there and gradient is not None:
                gradients[index] = layout.params[index].grad = gradient.clone()


def _address(gradient: Tensor | None) -> int:
    return 0 if gradient is None or gradient.is_sparse else gradient.data_ptr()


class Cleared:
    """Gradients set to zero. Large ones are dropped: what backward leaves next then needs no sum and no zeros."""

    def __init__(self) -> None:
        self._params: Any = WeakTensorKeyDictionary()

    def clear(self, params: Iterable[Tensor]) -> None:
        """Sets the gradient of each parameter that has one to zero; small ones in place."""
        small = []
        for param in params:
            gradient = param.grad
            if gradient is None:
                continue
            if gradient.numel() >= LARGE_NUMEL:
                param.grad = None
                self._params[param] = True
            elif gradient.requires_grad or gradient.is_sparse:
                param.grad = torch.zeros_like(gradient)
            else:
                small.append(gradient)
        if small:
            torch._foreach_zero_(small)

    def restore(self, params: Iterable[Tensor]) -> None:
        """Gives those of `params` that were dropped and got no gradient since their zeros."""
        for param in params:
            if param.grad is None and param in self._params:
                param.grad = torch.zeros_like(param)

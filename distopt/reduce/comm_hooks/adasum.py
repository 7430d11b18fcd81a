"""Adasum: a combination of gradients between their sum and their mean."""

from __future__ import annotations

import torch
from torch import Tensor

from distopt.backends import Backend, Handle
from distopt.reduce.layout import Bucket
from distopt.reduce.messages import Heard


class Adasum:
    """Combines gradients pairwise, parameter by parameter, as Adasum does.

    Two gradients a and b become a (1 - a·b / 2|a|²) + b (1 - a·b / 2|b|²): their sum when they are orthogonal, their
    mean when they are equal. Ranks swap with partners at distance 1, 2, 4, …; ranks beyond the largest power of two
    hand theirs to a partner first and receive the result last. Dot products are in float64 for float64 gradients and
    accumulated in float32 otherwise, by the same operations in the same order on both partners, so all ranks end equal.

    A departure from the paper and from Horovod: they combine the optimizer's updates where it has state (Adam); here
    the gradients are combined, before the wrapped optimizer sees them.

    Cost:
        log2(world size) exchanges of the whole bucket, two more when the world size is no power of two.

    References:
        Maleki et al., Scaling Distributed Training with Adaptive Summation, arXiv 2006.02924, section 3 and algorithm
        1.
    """

    rides = False
    scales_first = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._handles: dict[int, Handle] = {}

    def start(self, bucket: Bucket) -> None:
        """Starts the control slots' sum; gradients are exchanged in `finish`."""
        if bucket.slots is not None:
            self._handles[id(bucket)] = self._backend.all_reduce(bucket.buffer)

    def finish(self, bucket: Bucket, heard: Heard | None = None) -> None:
        """Combines the bucket's gradients."""
        if bucket.slots is not None:
            self._handles.pop(id(bucket)).wait()
        else:
            adasum_(self._backend, bucket.flat, bucket.offsets)

    def forget(self, names: set[str]) -> None:
        """Keeps nothing."""


def adasum_(backend: Backend, flat: Tensor, offsets: list[int]) -> None:
    """Overwrites `flat` (numel,) with the Adasum of all ranks'; each segment between `offsets` is one vector."""
    rank, size = backend.rank, backend.world_size
    core = 1 << (size.bit_length() - 1)
    beyond = size - core  # ranks core, core + 1, … are partners of ranks 0, 1, …
    if beyond:
        folded = rank - core if rank >= core else (rank + core if rank < beyond else None)
        received = backend.send_recv(flat, folded)
        if received is not None and rank < core:
            _combine_(flat, received, offsets)
    distance = 1
    while distance < core:
        received = backend.send_recv(flat, rank ^ distance if rank < core else None)
        if received is not None:
            first, second = (flat, received) if rank < rank ^ distance else (received, flat)
            _combine_(first, second, offsets)
            flat.copy_(first)
        distance *= 2
    if beyond:
        received = backend.send_recv(flat, folded)
        if received is not None and rank >= core:
            flat.copy_(received)


def _combine_(first: Tensor, second: Tensor, offsets: list[int]) -> None:
    """Overwrites `first` with the Adasum of two vectors, segment by segment."""
    bounds = list(zip(offsets, offsets[1:], strict=False))
    pieces = [(first[start:stop], second[start:stop]) for start, stop in bounds]
    dots = torch.stack([torch.stack([a.dot(b), a.dot(a), b.dot(b)]) for a, b in pieces]).unbind(1)
    half = 0.5 * dots[0]
    keep_first = torch.where(dots[1] > 0, 1 - half / dots[1], 1.0)
    keep_second = torch.where(dots[2] > 0, 1 - half / dots[2], 1.0)
    counts = torch.tensor([stop - start for start, stop in bounds], device=first.device)
    first.mul_(keep_first.repeat_interleave(counts)).addcmul_(second, keep_second.repeat_interleave(counts))

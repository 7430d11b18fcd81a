"""Adasum: a combination of gradients between their sum and their mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.reduce.comm_hooks.base import CommHook
from distopt.reduce.layout import Bucket
from distopt.reduce.messages import RoundSummary


class Adasum(CommHook):
    """Combines gradients pairwise, parameter by parameter, as Adasum does.

    Two gradients a and b become a (1 - a·b / 2|a|²) + b (1 - a·b / 2|b|²): their sum when they are orthogonal, their
    mean when they are equal. Dot products are in float64 for float64 gradients and accumulated in float32 otherwise.

    A departure from the paper and from Horovod: they combine the optimizer's updates where it has state (Adam); here
    the gradients are combined, before the wrapped optimizer sees them.

    Cost:
        log2(world size) exchanges of the whole bucket, two more when the world size is no power of two.

    References:
        Maleki et al., Scaling Distributed Training with Adaptive Summation, arXiv 2006.02924, section 3 and algorithm
        1.
    """

    def start(self, bucket: Bucket) -> None:
        """Does nothing: each exchange needs the result of the one before."""

    def finish(self, bucket: Bucket, started: Any, summary: RoundSummary | None) -> None:
        """Combines the bucket's gradients."""
        adasum_(self.backend, bucket.flat, bucket.offsets)


# Recursive doubling: in round k, each rank swaps its vector with the partner at distance 2^k, and both combine the two,
# so that after log2(W) rounds each holds the combination of all. The ranks beyond the largest power of two hand their
# vectors to a partner below it first, and receive the result last. A rank without a partner in some round takes part in
# it all the same, since exchanges are collective calls. Partners combine in the same order, the lower rank's vector
# first, by the same operations, so that all ranks end with the same bits.


def adasum_(backend: Backend, flat: Tensor, offsets: list[int]) -> None:
    """Overwrites `flat` (numel,) with the Adasum of all ranks'; each segment between `offsets` is one vector."""
    rank, size = backend.rank, backend.world_size
    num_paired = 1 << (size.bit_length() - 1)
    num_beyond = size - num_paired  # ranks num_paired, num_paired + 1, … are partners of ranks 0, 1, …

    if num_beyond:
        partner = rank - num_paired if rank >= num_paired else (rank + num_paired if rank < num_beyond else None)
        received = backend.send_recv(flat, partner)
        if received is not None and rank < num_paired:
            _combine_(flat, received, offsets)

    distance = 1
    while distance < num_paired:
        received = backend.send_recv(flat, rank ^ distance if rank < num_paired else None)
        if received is not None:
            first, second = (flat, received) if rank < rank ^ distance else (received, flat)
            _combine_(first, second, offsets)
            flat.copy_(first)
        distance *= 2

    if num_beyond:
        received = backend.send_recv(flat, partner)
        if received is not None and rank >= num_paired:
            flat.copy_(received)


def _combine_(first: Tensor, second: Tensor, offsets: list[int]) -> None:
    """Overwrites `first` with the Adasum of two vectors, segment by segment."""
    bounds = list(zip(offsets, offsets[1:], strict=False))
    pairs = [(first[start:stop], second[start:stop]) for start, stop in bounds]
    dots = torch.stack([torch.stack([a.dot(b), a.dot(a), b.dot(b)]) for a, b in pairs]).unbind(1)

    # A vector of zeros has no direction: the other one is kept as it is.
    half = 0.5 * dots[0]
    keep_first = torch.where(dots[1] > 0, 1 - half / dots[1], 1.0)
    keep_second = torch.where(dots[2] > 0, 1 - half / dots[2], 1.0)

    counts = torch.tensor([stop - start for start, stop in bounds], device=first.device)
    first.mul_(keep_first.repeat_interleave(counts)).addcmul_(second, keep_second.repeat_interleave(counts))

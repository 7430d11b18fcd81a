"""How the gradients of one bucket cross: summed as they are, or in 16 bits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distopt.backends import Backend, Handle
from distopt.reduce.layout import Bucket
from distopt.reduce.messages import Heard


class Exchange(Protocol):
    """One way to combine a bucket's gradients over all ranks; every rank uses the same one."""

    rides: bool
    """Whether a bucket's sum is plain, so that control slots may ride in it."""

    scales_first: bool
    """Whether gradients are divided by the world size before they are sent, lest the sum overflow."""

    def start(self, bucket: Bucket) -> None:
        """Starts combining `bucket.buffer`; several buckets may be under way."""

    def finish(self, bucket: Bucket, heard: Heard | None = None) -> None:
        """Returns when `bucket.flat` holds the combination, equal on all ranks bit by bit.

        Args:
            bucket: One that was started.
            heard: What the control slots said, None for the bucket that carries them.
        """

    def forget(self, names: set[str]) -> None:
        """Drops what is kept of these parameters from step to step."""


class Plain:
    """The sum in the gradients' own dtype: one all-reduce for each bucket."""

    rides = True
    scales_first = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._handles: dict[int, Handle] = {}

    def start(self, bucket: Bucket) -> None:
        """Starts one all-reduce of the whole buffer."""
        self._handles[id(bucket)] = self._backend.all_reduce(bucket.buffer)

    def finish(self, bucket: Bucket, heard: Heard | None = None) -> None:
        """Waits for it."""
        self._handles.pop(id(bucket)).wait()

    def forget(self, names: set[str]) -> None:
        """Keeps nothing."""


class Half:
    """The sum in 16 bits: half the bytes, 11 (float16) or 8 (bfloat16) significant bits.

    Gradients are divided by the world size first, so that the sum stays below float16's largest number, 65504. What
    rounding loses is not kept: an error of 2^-11 or 2^-8, unbiased between steps, is below a minibatch's own noise.

    Args:
        backend: Link to the other ranks.
        dtype: `torch.float16` or `torch.bfloat16`.
    """

    rides = False
    scales_first = True

    def __init__(self, backend: Backend, dtype: torch.dtype) -> None:
        self._backend, self._dtype = backend, dtype
        self._under_way: dict[int, tuple[Handle, Tensor]] = {}

    def start(self, bucket: Bucket) -> None:
        """Starts one all-reduce of a 16-bit copy; the bucket with the control slots crosses as it is."""
        sent = bucket.buffer if bucket.slots is not None else bucket.flat.to(self._dtype)
        self._under_way[id(bucket)] = (self._backend.all_reduce(sent), sent)

    def finish(self, bucket: Bucket, heard: Heard | None = None) -> None:
        """Waits for it and widens the result."""
        handle, sent = self._under_way.pop(id(bucket))
        handle.wait()
        if sent is not bucket.buffer:
            bucket.flat.copy_(sent)

    def forget(self, names: set[str]) -> None:
        """Keeps nothing."""

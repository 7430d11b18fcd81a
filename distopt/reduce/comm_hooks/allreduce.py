"""Communication hooks that all-reduce a bucket, in full or in 16-bit precision."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.backends import Handle
from distopt.reduce.comm_hooks.base import CommHook
from distopt.reduce.layout import Bucket
from distopt.reduce.messages import RoundSummary


class AllReduce(CommHook):
    """The sum in the gradients' dtype.

    Cost:
        One all-reduce for each bucket.
    """

    carries_control = True
    can_overlap = True

    def start(self, bucket: Bucket) -> Handle:
        """Starts one all-reduce of the whole buffer, with the control slots if it has some."""
        # Backward goes on meanwhile where it overlaps, and what is quickest takes sums further only in waits.
        start = self.backend.all_reduce if self.options.overlap else self.backend.sum_buffer
        return start(bucket.buffer)

    def finish(self, bucket: Bucket, started: Any, summary: RoundSummary | None) -> None:
        """Waits for it."""
        started.wait()


class Float16AllReduce(CommHook):
    """The sum in float16: half the bytes of float32, 11 significant bits.

    Gradients are divided by the world size first, so that the sum stays below float16's largest number, 65504. What
    rounding loses is not kept: a relative error of 2^-11, unbiased between steps, is below the sampling noise of a
    minibatch.

    Cost:
        One all-reduce of half the bytes for each bucket.
    """

    dtype: ClassVar[torch.dtype] = torch.float16
    divides_first = True
    can_overlap = True

    def start(self, bucket: Bucket) -> tuple[Handle, Tensor]:
        """Starts one all-reduce of a 16-bit copy."""
        rounded = bucket.flat.to(self.dtype)
        return self.backend.all_reduce(rounded), rounded

    def finish(self, bucket: Bucket, started: Any, summary: RoundSummary | None) -> None:
        """Waits for it and widens the result."""
        handle, rounded = started
        handle.wait()
        bucket.flat.copy_(rounded)


class BFloat16AllReduce(Float16AllReduce):
    """The sum in bfloat16: half the bytes of float32 and its range, 8 significant bits; else as in float16."""

    dtype = torch.bfloat16

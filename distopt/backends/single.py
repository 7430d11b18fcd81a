"""A world of one: the default, and what a script without a launcher runs in."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

from distopt.backends.base import DEFAULT_TIMEOUT, Handle, Json, Op


class _Done:
    def wait(self, timeout: timedelta | None = None) -> None:
        pass


class Single:
    """The backend of one process; every collective is the identity.

    Args:
        device: Where parameters live by default; the first GPU when there is one.
        timeout: Kept, never needed.

    Example:
        >>> Single().all_gather_json({"rows": 3})
        [{'rows': 3}]
    """

    def __init__(self, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        self.name = "single"
        self.rank = self.local_rank = self.node_rank = 0
        self.world_size = 1
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.timeout, self.closed = timeout, False
        self.all_reduce_s, self.all_reduce_bytes = 0.0, 0

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Leaves `tensor` as it is."""
        return _Done()

    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        """Leaves `tensor` as it is."""
        return _Done()

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        """Returns `tensor` under a leading axis of one."""
        return tensor.clone().unsqueeze(0)

    def exchange(self, tensor: Tensor, peer: int | None, timeout: timedelta | None = None) -> Tensor | None:
        """Has nobody to swap with: `peer` must be None."""
        if peer is not None:
            raise ValueError(f"exchange with rank {peer}: this world has one rank.")
        return None

    def all_gather_json(self, value: Json, timeout: timedelta | None = None) -> list[Json]:
        """Returns `[value]`."""
        return [value]

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Returns at once."""

    def note(self, step: int, phase: str) -> None:
        """Has nobody to tell."""

    def fail(self, error: BaseException) -> None:
        """Has nobody to tell."""

    def close(self) -> None:
        """Lets `init` make another."""
        self.closed = True

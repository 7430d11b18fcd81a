"""A world of one: the default, and what a script without a launcher runs in."""

from __future__ import annotations

from datetime import timedelta
from typing import Self

import torch
from torch import Tensor

from distopt.backends.base import DEFAULT_TIMEOUT, Backend, Handle, Json, Op
from distopt.launchers import RankInfo


class _Done:
    def wait(self, timeout: timedelta | None = None) -> None:
        pass


class Single(Backend):
    """The backend of one process; every collective is the identity.

    Args:
        device: Where parameters live by default; the first GPU where there is one.
        timeout: Kept for those who ask, since nothing here waits.

    Example:
        >>> Single().all_gather_json({"rows": 3})
        [{'rows': 3}]
    """

    name = "single"

    def __init__(self, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(RankInfo("this process", 0, 1), device=device, timeout=timeout)

    @classmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta) -> Self:
        """Returns a world of this process alone, whoever started it."""
        return cls(timeout=timeout)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Leaves `tensor` as it is."""
        return _Done()

    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        """Leaves `tensor` as it is."""
        return _Done()

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        """Returns a copy of `tensor` under a leading axis of one."""
        return tensor.clone().unsqueeze(0)

    def send_recv(self, tensor: Tensor, peer: int | None, timeout: timedelta | None = None) -> Tensor | None:
        """Returns None; there is no other rank, so `peer` must be None."""
        if peer is not None:
            raise ValueError(f"send_recv with rank {peer}: this world has one rank.")
        return None

    def all_gather_json(self, value: Json, timeout: timedelta | None = None) -> list[Json]:
        """Returns `[value]`."""
        return [value]

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Returns at once."""

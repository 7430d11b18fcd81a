"""What one worker can say to the others: the contract that every backend fulfils."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Json: TypeAlias = Any
"""What `json` can carry: None, bool, int, float, str, and lists and string-keyed dicts of these."""

Op: TypeAlias = Literal["sum", "min", "max"]

DEFAULT_TIMEOUT = timedelta(minutes=5)


class BackendError(RuntimeError):
    """A collective that failed or never finished; the message names rank, world size and what to check."""


class Handle(Protocol):
    """A collective that has been started."""

    def wait(self, timeout: timedelta | None = None) -> None:
        """Returns when the result is in the tensor; raises `BackendError` when `timeout` passes first."""


@runtime_checkable
class Backend(Protocol):
    """One worker's link to the others of its world.

    All ranks must call the same collectives in the same order; `distopt.reduce` holds that order. Every wait takes a
    timeout, None meaning the one given to `init`. Objects cross as JSON, never as pickles.
    """

    name: str
    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    device: torch.device
    timeout: timedelta
    all_reduce_s: float
    """Seconds spent so far in waiting for sums over the ranks."""
    all_reduce_bytes: int
    """Bytes given so far into sums over the ranks."""

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Starts combining `tensor` over all ranks, in place; it must not be touched before `wait`."""

    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        """Starts overwriting `tensor` in place with rank `root`'s."""

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        """Returns every rank's `tensor` (one shape on all), stacked in the order of ranks: (world_size, *shape)."""

    def exchange(self, tensor: Tensor, peer: int | None, timeout: timedelta | None = None) -> Tensor | None:
        """Swaps `tensor` with rank `peer`'s of the same shape and returns that; None takes part without a partner."""

    def all_gather_json(self, value: Json, timeout: timedelta | None = None) -> list[Json]:
        """Returns every rank's `value`, in the order of ranks."""

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Returns when all ranks have called it."""

    def note(self, step: int, phase: str) -> None:
        """Tells the heartbeat where this rank is, for the others' error messages; costs two assignments."""

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank stops, so that they raise this cause and do not wait for their timeout."""

    def close(self) -> None:
        """Leaves the world; calling it twice does nothing."""

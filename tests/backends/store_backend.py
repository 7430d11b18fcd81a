"""A backend of a user's own, in one class outside of distopt: every collective goes through a TCP store."""

from __future__ import annotations

from datetime import timedelta
from functools import reduce
from typing import Self

import torch
from torch import Tensor
from torch.distributed import TCPStore

from distopt.backends import Backend, BackendError, Handle, Op
from distopt.launchers import RankInfo, find_rendezvous

COMBINE = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


class StoreBackend(Backend):
    """Each rank puts its tensor into the store under the number of the call, and reads those of the others."""

    name = "store"

    def __init__(self, rank_info: RankInfo, *, timeout: timedelta) -> None:
        super().__init__(rank_info, timeout=timeout)
        address, port = find_rendezvous(rank_info)
        self.store = TCPStore(address, port, self.world_size, self.rank == 0, timeout)
        self.calls = 0

    @classmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta) -> Self:
        if rank_info is None:
            raise BackendError("StoreBackend needs a launcher")
        return cls(rank_info, timeout=timeout)

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        call = self.put(tensor)

        class Reduced:
            def wait(handle, timeout: timedelta | None = None) -> None:
                tensor.copy_(reduce(COMBINE[op], self.get_all(call, tensor, timeout)))

        return Reduced()

    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        call = self.put(tensor)

        class Received:
            def wait(handle, timeout: timedelta | None = None) -> None:
                tensor.copy_(self.get_all(call, tensor, timeout)[root])

        return Received()

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        return torch.stack(self.get_all(self.put(tensor), tensor, timeout))

    def put(self, tensor: Tensor) -> int:
        if self.closed:
            raise BackendError("this backend was closed")
        self.calls += 1
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self.store.set(f"{self.calls}/{self.rank}", data)
        return self.calls

    def get_all(self, call: int, like: Tensor, timeout: timedelta | None) -> list[Tensor]:
        keys = [f"{call}/{rank}" for rank in range(self.world_size)]
        try:
            self.store.wait(keys, timeout or self.timeout)
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise BackendError(f"call {call}: rank(s) {missing} of {self.world_size} are missing") from error
        rows = [torch.frombuffer(bytearray(self.store.get(key)), dtype=like.dtype) for key in keys]
        return [row.reshape(like.shape) for row in rows]

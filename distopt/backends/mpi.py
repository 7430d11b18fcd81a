"""mpi4py as a backend, for clusters that have only mpirun."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from distopt.backends.base import DEFAULT_TIMEOUT, BackendError, Op
from distopt.backends.heartbeat import make_side_store
from distopt.backends.torch_dist import choose_device
from distopt.backends.world import Pending, World
from distopt.launchers import RankInfo

_COMBINE = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
_SPIN_S = 2e-4


class Mpi(World):
    """An MPI communicator.

    Tensors on a GPU and tensors that are not contiguous go through a copy on the CPU. MPI has no 16-bit floating-point
    type, so those are combined by a callback of ours.

    Args:
        communicator: `mpi4py.MPI.Comm` to use; a duplicate of the world's when None, so that a script's own messages
            and ours never meet.
        device: Where parameters live by default; chosen by local rank when None.
        timeout: For every wait.
    """

    library = "mpi"

    def __init__(
        self, *, communicator: Any = None, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise BackendError(
                f"mpi4py is not installed or finds no MPI library ({error}). `make setup-dev` installs both, or "
                "`pip install 'distopt[mpi]'` beside the cluster's own MPI."
            ) from error
        self._mpi, self._own = MPI, communicator is None
        self._comm = MPI.COMM_WORLD.Dup() if communicator is None else communicator
        self._ops = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
        self._half_ops: dict[tuple[str, torch.dtype], Any] = {}
        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        rank_info = RankInfo("mpirun", self._comm.rank, self._comm.size, local.rank, local.size)
        local.Free()
        super().__init__(rank_info, device or choose_device(rank_info), timeout)
        self.open()

    def _start_all_reduce(self, tensor: Tensor, op: Op) -> Pending:
        host = _on_host(tensor)
        mpi_op = self._half_op(op, tensor.dtype) if tensor.dtype in (torch.float16, torch.bfloat16) else self._ops[op]
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, self._buffer(host), op=mpi_op)
        return _MpiPending([request], tensor, host)

    def _start_broadcast(self, tensor: Tensor, root: int) -> Pending:
        host = _on_host(tensor)
        return _MpiPending([self._comm.Ibcast(_raw(host, self._mpi), root=root)], tensor, host)

    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> Pending:
        sent, host = _on_host(tensor), _on_host(gathered)
        request = self._comm.Iallgather(_raw(sent, self._mpi), _raw(host, self._mpi))
        return _MpiPending([request], gathered, host, sent)

    def _start_exchange(self, tensor: Tensor, peer: int | None, received: Tensor) -> Pending:
        if peer is None:
            return _MpiPending([], received, received)
        sent, host = _on_host(tensor), _on_host(received)
        requests = [self._comm.Irecv(_raw(host, self._mpi), peer), self._comm.Isend(_raw(sent, self._mpi), peer)]
        return _MpiPending(requests, received, host, sent)

    def _make_store(self) -> Store:
        return make_side_store(self.rank, self.all_gather_json)

    def _leave(self) -> None:
        if self._own:
            self._comm.Free()

    def _buffer(self, host: Tensor) -> Any:
        if host.dtype in (torch.float16, torch.bfloat16):
            return [host.view(torch.int16).numpy(), self._mpi.INT16_T]
        return host.numpy()

    def _half_op(self, op: Op, dtype: torch.dtype) -> Any:
        key = (op, dtype)
        if key not in self._half_ops:
            combine: Any = _COMBINE[op]

            def function(incoming: Any, combined: Any, datatype: Any) -> None:
                left, right = torch.frombuffer(incoming, dtype=dtype), torch.frombuffer(combined, dtype=dtype)
                combine(left, right, out=right)

            self._half_ops[key] = self._mpi.Op.Create(function, commute=True)
        return self._half_ops[key]


class _MpiPending:
    """Requests of MPI, which makes progress only while it is asked."""

    def __init__(self, requests: list[Any], tensor: Tensor, host: Tensor, sent: Tensor | None = None) -> None:
        self._requests, self._tensor, self._host = requests, tensor, host
        self._sent = sent  # MPI reads it until the request is done

    def poll(self, seconds: float) -> bool:
        started = time.monotonic()
        while not all([request.Test() for request in self._requests]):
            waited = time.monotonic() - started
            if waited >= seconds:
                return False
            if waited < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(2e-5)
        if self._host.data_ptr() != self._tensor.data_ptr():
            self._tensor.copy_(self._host)
        return True


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _raw(host: Tensor, mpi: Any) -> Any:
    return [host.reshape(-1).view(torch.uint8).numpy(), mpi.BYTE]

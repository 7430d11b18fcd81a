"""mpi4py as a backend, for clusters that have only mpirun."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from distopt.backends.base import DEFAULT_TIMEOUT, BackendError, Op
from distopt.backends.heartbeat import start_store
from distopt.backends.world import PendingCollective, World, refuse_split_world
from distopt.launchers import RankInfo

_COMBINE = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}
_SPIN_S = 2e-4


class Mpi(World):
    """An MPI communicator.

    Tensors on a GPU and tensors that are not contiguous go through a copy on the CPU. MPI has no 16-bit floating-point
    type, so such tensors are combined by a callback in Python.

    Args:
        communicator: The `mpi4py.MPI.Comm` to use; a duplicate of the world's when None, which keeps the messages of
            distopt apart from those of the script.
        device: Where parameters live by default; chosen by local rank when None.
        timeout: For every wait that is not given its own.

    Raises:
        BackendError: mpi4py is not installed or finds no MPI library.
    """

    name = "mpi"

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

        self._mpi = MPI
        self._owns_comm = communicator is None
        self._comm = MPI.COMM_WORLD.Dup() if communicator is None else communicator
        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        rank_info = RankInfo("mpirun", self._comm.rank, self._comm.size, local.rank, local.size)
        local.Free()
        super().__init__(rank_info, device=device, timeout=timeout)

        self._ops = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}
        self._half_ops: dict[tuple[str, torch.dtype], Any] = {}
        self.open()

    @classmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta = DEFAULT_TIMEOUT) -> Self:
        """Initialises MPI, unless the script has, and returns the backend.

        Raises:
            BackendError: mpi4py is not installed, or found another number of ranks than the launcher started.
        """
        backend = cls(timeout=timeout)
        refuse_split_world(backend, rank_info)
        return backend

    def _start_all_reduce(self, tensor: Tensor, op: Op) -> PendingCollective:
        host = _on_host(tensor)
        mpi_op = self._half_op(op, tensor.dtype) if tensor.dtype in (torch.float16, torch.bfloat16) else self._ops[op]
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, self._buffer(host), op=mpi_op)
        return _MpiPending([request], tensor, host)

    def _start_broadcast(self, tensor: Tensor, root: int) -> PendingCollective:
        host = _on_host(tensor)
        return _MpiPending([self._comm.Ibcast(_raw(host, self._mpi), root=root)], tensor, host)

    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> PendingCollective:
        sent = _on_host(tensor)
        host = _on_host(gathered)
        request = self._comm.Iallgather(_raw(sent, self._mpi), _raw(host, self._mpi))
        return _MpiPending([request], gathered, host, sent)

    def _start_send_recv(self, tensor: Tensor, peer: int | None, received: Tensor) -> PendingCollective:
        if peer is None:
            return _MpiPending([], received, received)
        sent = _on_host(tensor)
        host = _on_host(received)
        requests = [self._comm.Irecv(_raw(host, self._mpi), peer), self._comm.Isend(_raw(sent, self._mpi), peer)]
        return _MpiPending(requests, received, host, sent)

    def _make_store(self) -> Store:
        return start_store(self.rank, self.all_gather_json)

    def _leave(self) -> None:
        if self._owns_comm:
            self._comm.Free()

    def _buffer(self, host: Tensor) -> Any:
        if host.dtype in (torch.float16, torch.bfloat16):
            return [host.view(torch.int16).numpy(), self._mpi.INT16_T]
        return host.numpy()

    def _half_op(self, op: Op, dtype: torch.dtype) -> Any:
        """An MPI operation that reads 16-bit integers as the floating-point numbers that they stand for."""
        key = (op, dtype)
        if key not in self._half_ops:
            combine: Any = _COMBINE[op]

            def function(incoming: Any, combined: Any, datatype: Any) -> None:
                left = torch.frombuffer(incoming, dtype=dtype)
                right = torch.frombuffer(combined, dtype=dtype)
                combine(left, right, out=right)

            self._half_ops[key] = self._mpi.Op.Create(function, commute=True)
        return self._half_ops[key]


class _MpiPending:
    """Requests of MPI, and the tensor that gets their result.

    Args:
        requests: What MPI returned.
        tensor: What the caller reads.
        host: What MPI writes: `tensor` itself, or its copy on the CPU.
        sent: What MPI reads until the requests are done; kept alive here.
    """

    def __init__(self, requests: list[Any], tensor: Tensor, host: Tensor, sent: Tensor | None = None) -> None:
        self._requests = requests
        self._tensor = tensor
        self._host = host
        self._sent = sent

    def poll(self, seconds: float) -> bool:
        # MPI makes progress only while it is called. So a short wait spins, giving the core to whoever wants it (other
        # ranks, where there are more of them than cores), and a longer one sleeps between two calls.
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
    """A buffer of bytes, for collectives that only copy."""
    return [host.reshape(-1).view(torch.uint8).numpy(), mpi.BYTE]

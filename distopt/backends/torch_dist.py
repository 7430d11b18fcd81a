"""torch.distributed as a backend: gloo on CPUs, NCCL on GPUs, whatever a script's own process group uses."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from distopt.backends.base import DEFAULT_TIMEOUT, BackendError, Op
from distopt.backends.world import Pending, World
from distopt.launchers import LauncherError, RankInfo, find_rendezvous

_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
_SHORTEST_WAIT_S = 2e-3  # torch counts in milliseconds, and takes 0 for no timeout at all


class TorchDist(World):
    """A `torch.distributed` process group: the default backend.

    Args:
        rank_info: This process's rank and world size.
        group: Process group to use; the default one when None.
        device: Where parameters live by default; chosen by local rank when None.
        timeout: For every wait.
        own: Whether `close` destroys the process group.
    """

    library = "torch_dist"
    _num_worlds: ClassVar[int] = 0  # that this process has taken part in

    def __init__(
        self,
        rank_info: RankInfo,
        *,
        group: Any = None,
        device: torch.device | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        own: bool = False,
    ) -> None:
        super().__init__(rank_info, device or choose_device(rank_info), timeout)
        self._group, self._own = group, own
        self._has_gloo = "gloo" in str(dist.get_backend_config(group))
        self.open()

    @classmethod
    def start(
        cls, rank_info: RankInfo, *, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT
    ) -> TorchDist:
        """Meets the other ranks at MASTER_ADDR:MASTER_PORT and returns the backend.

        Raises:
            BackendError: The address cannot be reached or not all ranks came within the timeout.
        """
        try:
            address, port = find_rendezvous(rank_info)
        except LauncherError as error:
            raise BackendError(str(error)) from error
        device = device or choose_device(rank_info)
        engine = "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            store = _local_store(address, port, rank_info, timeout)
            dist.init_process_group(
                engine,
                # torchrun's agent may hold the store; then no rank opens it, which torch reads from the environment.
                init_method=f"tcp://{address}:{port}" if store is None else None,
                store=store,
                rank=rank_info.rank,
                world_size=rank_info.world_size,
                timeout=timeout,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise BackendError(
                f"rank {rank_info.rank} of {rank_info.world_size}, started by {rank_info.launcher}: not all ranks met "
                f"at {address}:{port} within {timeout.total_seconds():g} s. Check that MASTER_ADDR is the host of rank "
                f"0 and can be reached from here, that MASTER_PORT is free there, and that {rank_info.world_size} "
                f"processes were started. torch says: {str(error).splitlines()[0]}"
            ) from error
        return cls(rank_info, device=device, timeout=timeout, own=True)

    @classmethod
    def adopt(cls, group: Any = None, *, timeout: timedelta = DEFAULT_TIMEOUT) -> TorchDist:
        """Uses a process group that the script made itself, which stays the script's to destroy.

        Raises:
            BackendError: This process is not one of the group's.
        """
        if dist.get_rank(group) < 0:
            raise BackendError(
                f"rank {dist.get_rank()} of {dist.get_world_size()} is not in the process group that it was given. Use "
                "it on its own ranks alone (`if torch.distributed.get_rank(group) >= 0:`), and another on the others."
            )
        return cls(
            RankInfo("the script", dist.get_rank(group), dist.get_world_size(group)), group=group, timeout=timeout
        )

    @property
    def json_device(self) -> torch.device:
        """The CPU where gloo serves it, else the GPU."""
        return torch.device("cpu") if self._has_gloo else self.device

    def _start_all_reduce(self, tensor: Tensor, op: Op) -> Pending:
        return _pend(dist.all_reduce(tensor, _OPS[op], group=self._group, async_op=True))

    def _start_broadcast(self, tensor: Tensor, root: int) -> Pending:
        return _pend(dist.broadcast(tensor, group=self._group, async_op=True, group_src=root))

    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> Pending:
        return _pend(dist.all_gather(list(gathered.unbind()), tensor, group=self._group, async_op=True))

    def _start_exchange(self, tensor: Tensor, peer: int | None, received: Tensor) -> Pending:
        if peer is None:
            return _Works([])
        ops = [
            dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, received, group=self._group, group_peer=peer),
        ]
        return _Works(dist.batch_isend_irecv(ops))

    def _make_store(self) -> Store:
        ranks = dist.get_process_group_ranks(self._group if self._group is not None else dist.group.WORLD)
        # What a world that was closed has left in the store is not this one's: "rank 0 has ended", say.
        TorchDist._num_worlds = 1 + max(self.all_gather_json(TorchDist._num_worlds))
        # A clone has its own connection: a hung read of ours never holds up torch's own use of the store.
        store: Any = dist.distributed_c10d._get_default_store()
        return PrefixStore(f"distopt/{TorchDist._num_worlds}/{ranks}", store.clone())

    def _leave(self) -> None:
        if self._own and dist.is_initialized():
            dist.destroy_process_group()


def _local_store(address: str, port: int, rank_info: RankInfo, timeout: timedelta) -> Store | None:
    """Where all ranks are on this machine, a store that listens there alone; torch's own listens on all interfaces."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or address not in ("127.0.0.1", "localhost"):
        return None
    is_master = rank_info.rank == 0
    listener = socket.create_server(("127.0.0.1", port)).detach() if is_master else None
    return TCPStore("127.0.0.1", port, rank_info.world_size, is_master, timeout, master_listen_fd=listener)


class _Works:
    """Works of torch.distributed, waited for in slices."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def poll(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._works:
            if not _poll_work(self._works[0], max(_SHORTEST_WAIT_S, deadline - time.monotonic())):
                return False
            self._works.pop(0)
        return True


def _pend(work: Any) -> Pending:
    return _Works([work])


def _poll_work(work: Any, seconds: float) -> bool:
    if type(work).__name__ == "WorkNCCL":  # its wait() only orders streams, so the host has to look by itself
        deadline = time.monotonic() + seconds
        while not work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(2e-5)
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():  # the wait timed out, which leaves it running
            return False
        work.wait()  # raises when it has failed; it may also have ended well just after the wait did
    return True


def choose_device(rank_info: RankInfo) -> torch.device:
    """Returns this process's GPU when the machine has one for each of its processes, else the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank = rank_info.local_rank or 0
    if gpus and gpus >= (rank_info.local_size or local_rank + 1):
        return torch.device("cuda", local_rank)
    return torch.device("cpu")

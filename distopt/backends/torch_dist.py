"""torch.distributed as a backend: gloo on CPUs, NCCL on GPUs, or whatever the script's process group uses."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from distopt.backends.base import DEFAULT_TIMEOUT, BackendError, Handle, Op
from distopt.backends.shared_memory import SharedMemory
from distopt.backends.world import PendingCollective, World, choose_device
from distopt.launchers import LauncherError, RankInfo, find_rendezvous

_OPS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
_GLOO_THREADS = ("gloo_tcp_loop", "pt_gloo_runloop")  # as torch names them
_SHORTEST_WAIT_S = 2e-3  # torch counts in milliseconds, and takes 0 for no timeout at all


class TorchDist(World):
    """A `torch.distributed` process group: the default backend.

    Args:
        rank_info: This process's rank and the group's size.
        group: The process group; the default one when None.
        device: Where parameters live by default; chosen by local rank when None.
        timeout: For every wait that is not given its own.
        owns_group: Whether `close` destroys the process group.
    """

    name = "torch_dist"
    _num_worlds: ClassVar[int] = 0  # that this process has joined

    def __init__(
        self,
        rank_info: RankInfo,
        *,
        group: Any = None,
        device: torch.device | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        owns_group: bool = False,
    ) -> None:
        super().__init__(rank_info, device=device, timeout=timeout)
        self._group = group
        self._owns_group = owns_group
        self._shared: SharedMemory | None = None
        self._has_gloo = "gloo" in str(dist.get_backend_config(group))
        self.open()
        if self._has_gloo and self.world_size > 1:
            self._shared = SharedMemory.find(self)
        if self._has_gloo:
            _let_writers_finish()

    @classmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta = DEFAULT_TIMEOUT) -> Self:
        """Meets the other ranks at MASTER_ADDR:MASTER_PORT and returns the backend.

        A process group that the script has made already is adopted.

        Raises:
            BackendError: There is no launcher, the address cannot be reached, or not all ranks came within the timeout.
        """
        if dist.is_initialized():
            return cls.adopt(timeout=timeout)
        if rank_info is None:
            raise BackendError(
                "init('torch_dist'): no launcher's variables are in the environment. Start the script by torchrun or "
                "`distopt launch`, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            )
        try:
            address, port = find_rendezvous(rank_info)
        except LauncherError as error:
            raise BackendError(str(error)) from error

        device = choose_device(rank_info)
        # NCCL refuses two ranks on one GPU, which instances of MIG may be. Gloo copies through host memory.
        has_instance = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
        has_nccl = device.type == "cuda" and dist.is_nccl_available() and not has_instance
        libraries = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)

        try:
            store = _local_store(address, port, rank_info, timeout)
            dist.init_process_group(
                libraries,
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
        return cls(rank_info, device=device, timeout=timeout, owns_group=True)

    @classmethod
    def adopt(cls, group: Any = None, *, timeout: timedelta = DEFAULT_TIMEOUT) -> Self:
        """Returns a backend over a process group that the script made; destroying it is left to the script.

        Args:
            group: The process group; the default one when None.
            timeout: For every wait that is not given its own.

        Raises:
            BackendError: This process is not one of the group's.
        """
        if dist.get_rank(group) < 0:
            raise BackendError(
                f"rank {dist.get_rank()} of {dist.get_world_size()} is not in the process group that it was given. Use "
                "the group only on its own ranks (`if torch.distributed.get_rank(group) >= 0:`), and another one on "
                "the others."
            )
        rank_info = RankInfo("the script", dist.get_rank(group), dist.get_world_size(group))
        return cls(rank_info, group=group, timeout=timeout)

    @property
    def control_device(self) -> torch.device:
        """The CPU where gloo serves it, else the GPU."""
        return torch.device("cpu") if self._has_gloo else self.device

    def sum_buffer(self, buffer: Tensor) -> Handle:
        """Starts summing a buffer over all ranks: through memory where all of them are on this machine."""
        shared = self._shared
        if shared is None or not shared.takes(buffer):
            return super().sum_buffer(buffer)
        self.all_reduce_bytes += buffer.nbytes
        return self._start("all_reduce", buffer, lambda: shared.start(buffer), noted="sum_buffer")

    def _note_call(self, what: str, tensor: Tensor) -> None:
        if self._shared is not None:  # what all ranks call alike: each names another partner of a send_recv
            self._shared.note(f"{what.partition(' with')[0]} of {tensor.numel():,} x {tensor.dtype}")

    def _start_all_reduce(self, tensor: Tensor, op: Op) -> PendingCollective:
        return _Works([dist.all_reduce(tensor, _OPS[op], group=self._group, async_op=True)])

    def _start_broadcast(self, tensor: Tensor, root: int) -> PendingCollective:
        return _Works([dist.broadcast(tensor, group=self._group, async_op=True, group_src=root)])

    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> PendingCollective:
        return _Works([dist.all_gather(list(gathered.unbind()), tensor, group=self._group, async_op=True)])

    def _start_send_recv(self, tensor: Tensor, peer: int | None, received: Tensor) -> PendingCollective:
        if peer is None:
            return _Works([])
        ops = [
            dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer),
            dist.P2POp(dist.irecv, received, group=self._group, group_peer=peer),
        ]
        return _Works(dist.batch_isend_irecv(ops))

    def _make_store(self) -> Store:
        ranks = dist.get_process_group_ranks(self._group if self._group is not None else dist.group.WORLD)

        # The store outlives a world that was closed, with what it wrote: that rank 0 has exited, say. So each world of
        # a process writes below a number of its own, on which all ranks agree though some may have joined fewer worlds.
        TorchDist._num_worlds = 1 + max(self.all_gather_json(TorchDist._num_worlds))

        # A clone has its own connection: a read that hangs here never holds up torch's use of the store.
        store: Any = dist.distributed_c10d._get_default_store()
        return PrefixStore(f"distopt/{TorchDist._num_worlds}/{ranks}", store.clone())

    def _leave(self) -> None:
        self._shared = None
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


def _local_store(address: str, port: int, rank_info: RankInfo, timeout: timedelta) -> Store | None:
    """A store on the loopback interface where all ranks are on this machine; torch's listens on all interfaces."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or address not in ("127.0.0.1", "localhost"):
        return None
    is_master = rank_info.rank == 0
    listener = socket.create_server(("127.0.0.1", port)).detach() if is_master else None
    return TCPStore("127.0.0.1", port, rank_info.world_size, is_master, timeout, master_listen_fd=listener)


def _let_writers_finish() -> None:
    """Keeps gloo's threads from taking the processor from the one that has just woken them.

    That one still holds the lock of the connection, and gloo asks for the lock again and again until its time slice
    ends: 3 to 4 ms of a step where each rank has a core to itself (`make bench ARGS=workers`). Linux does not let a
    thread of the policy SCHED_BATCH interrupt another one; its share of the processor is as before.
    """
    tasks = Path("/proc/self/task")
    if not hasattr(os, "SCHED_BATCH") or not tasks.exists():
        return
    for task in tasks.iterdir():
        with suppress(OSError):  # it has ended, or a sandbox forbids the call
            if (task / "comm").read_text().strip() in _GLOO_THREADS:
                os.sched_setscheduler(int(task.name), os.SCHED_BATCH, os.sched_param(0))


class _Works:
    """Works of torch.distributed, done when all of them are."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def poll(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._works:
            if not _poll_work(self._works[0], max(_SHORTEST_WAIT_S, deadline - time.monotonic())):
                return False
            self._works.pop(0)
        return True


def _poll_work(work: Any, seconds: float) -> bool:
    if type(work).__name__ == "WorkNCCL":  # its wait() only orders streams, so completion is polled
        deadline = time.monotonic() + seconds
        while not work.is_completed():
            if time.monotonic() > deadline:
                return False
            time.sleep(2e-5)

    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():  # the wait timed out, which leaves the work running
            return False
        work.wait()  # raises where the work has failed; it may also have succeeded just after the wait ended
    return True

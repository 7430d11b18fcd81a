"""Sums over ranks that share a machine, through memory that all of them map: see `_shared_memory.cpp`.

Over the loopback interface gloo takes 0.1 to 0.9 ms to sum a hundred numbers of two ranks, and their captured step may
take less. Through memory it is a few microseconds (`python -m tests.benchmarks.bench_reduce sums`).
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from distopt.backends.base import Backend
from distopt.backends.process_ends import has_ended, namespaces, this_process

logger = logging.getLogger(__name__)

VARIABLE = "DISTOPT_SHARED_MEMORY"
"""Set to 0 on any rank, it has all of them sum over the network."""

SLOT_BYTES = 256 * 1024
"""What a rank writes before the others read it: two of these and what they become stay in a core's cache."""

MAX_BYTES = 256 * 1024 * 1024
"""All ranks read what each has written; of larger sums, over all ranks, a ring on which each adds a part takes less."""

_LOOK_S = 0.05  # how often a wait looks whether the processes that it waits for have ended
_DTYPES = (torch.float32, torch.float64, torch.int64)


class SharedMemory:
    """Sums of one world whose ranks are all on this machine; `find` makes it.

    Args:
        memory: What all ranks have mapped.
        rank: This process's rank.
        processes: The name of each rank's process, as `this_process` returns it there.
    """

    def __init__(self, memory: mmap.mmap, rank: int, processes: Sequence[str]) -> None:
        from distopt.backends._shared_memory import Sums

        self._sums = Sums(memory, rank, len(processes), SLOT_BYTES)
        self._processes = processes
        self._started: dict[int, Tensor] = {}  # the sums whose tensors are read and written, kept alive here

    @classmethod
    def find(cls, backend: Backend) -> SharedMemory | None:
        """Returns the memory that all ranks share; None where they do not, or some rank is told not to.

        Cost:
            Collective: one or two calls of `all_gather_json`.
        """
        fd = _create(backend) if backend.rank == 0 else None
        try:
            process = this_process() if _may_share() else ""
            ranks = backend.all_gather_json([process, namespaces(), fd])
            processes = [process for process, _, _ in ranks]
            if not all(processes) or len({namespace for _, namespace, _ in ranks}) > 1 or ranks[0][2] is None:
                return None
            memory = _map(fd if fd is not None else f"/proc/{processes[0].split()[-2]}/fd/{ranks[0][2]}", backend)
            if not all(backend.all_gather_json(memory is not None)) or memory is None:
                return None
            return cls(memory, backend.rank, processes)
        finally:
            if fd is not None:
                os.close(fd)

    def takes(self, tensor: Tensor, op: str) -> bool:
        """Whether `start` sums such tensors; the same on all ranks."""
        return (
            op == "sum"
            and tensor.device.type == "cpu"
            and tensor.dtype in _DTYPES
            and tensor.is_contiguous()
            and tensor.nbytes * len(self._processes) <= MAX_BYTES
        )

    def start(self, tensor: Tensor) -> SharedSum:
        """Starts summing a tensor, in place; all ranks start the same sums in the same order."""
        number = self._sums.start(tensor.data_ptr(), tensor.nbytes, str(tensor.dtype))
        self._started[number] = tensor
        return SharedSum(self, number)

    def poll(self, number: int, seconds: float) -> bool:
        """Waits up to `seconds` for a sum and returns whether it is done.

        Raises:
            RuntimeError: The process of a rank has ended without its part.
        """
        deadline = time.monotonic() + seconds
        while not self._sums.wait(number, max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
            ended = [rank for rank in self._sums.missing() if has_ended(self._processes[rank])]
            if ended and not self._sums.wait(number, 0.0):
                raise RuntimeError(f"the process of rank {ended[0]} has ended")
            if time.monotonic() >= deadline:
                return False
        self._started.pop(number, None)
        return True


class SharedSum:
    """A sum that has been started."""

    def __init__(self, shared: SharedMemory, number: int) -> None:
        self._shared = shared
        self._number = number

    def poll(self, seconds: float) -> bool:
        """Waits up to `seconds` and returns whether it is done; raises RuntimeError where a rank has ended."""
        return self._shared.poll(self._number, seconds)


def _may_share() -> bool:
    """Whether this rank is not told otherwise, and its loops in C++ were compiled."""
    try:
        from distopt.backends import _shared_memory  # noqa: F401
    except ImportError as error:
        logger.debug("ranks of this machine sum over the network: %s", error)
        return False
    return os.environ.get(VARIABLE, "1") != "0"


def _create(backend: Backend) -> int | None:
    """Creates memory without a name, which ends with the last process that has mapped it; None where that fails."""
    if not _may_share() or not hasattr(os, "memfd_create"):
        return None
    from distopt.backends._shared_memory import Sums

    fd = None
    try:
        fd = os.memfd_create("distopt")
        os.ftruncate(fd, Sums.num_bytes(backend.world_size, SLOT_BYTES))
    except OSError as error:
        logger.debug("ranks of this machine sum over the network: %s", error)
        if fd is not None:
            os.close(fd)
        return None
    return fd


def _map(path: int | str, backend: Backend) -> mmap.mmap | None:
    """Maps the memory of rank 0; None where this process may not."""
    from distopt.backends._shared_memory import Sums

    with suppress(OSError, ValueError):
        fd = os.dup(path) if isinstance(path, int) else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, Sums.num_bytes(backend.world_size, SLOT_BYTES))
        finally:
            os.close(fd)
    return None

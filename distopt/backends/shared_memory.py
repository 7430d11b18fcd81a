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
from typing import Any

import torch
from torch import Tensor

from distopt.backends.base import Backend, MismatchError
from distopt.backends.process_ends import has_ended, namespaces, this_process

logger = logging.getLogger(__name__)

VARIABLE = "DISTOPT_SHARED_MEMORY"
"""Set to 0 on any rank, it has all of them sum over the network."""

SLOT_BYTES = 256 * 1024
"""What a rank writes before the others read it: two of these and what they become stay in a core's cache."""

MAX_BYTES = 256 * 1024 * 1024
"""All ranks read what each has written; of larger sums, over all ranks, a ring on which each adds a part takes less."""

_LOOK_S = 0.05  # how often a wait looks whether the others still come
_DTYPES = (torch.float32, torch.float64, torch.int64)
_NUM_NOTED = 64  # of this rank's calls, which are compared with those of ranks that are behind


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
        self._rank = rank
        self._processes = processes
        self._process = os.getpid()
        self._started: dict[int, Tensor] = {}  # the sums whose tensors are read and written, kept alive here
        self._num_calls = 0
        self._calls: dict[int, str] = {}  # the last ones of this rank, by their number

    @classmethod
    def find(cls, backend: Backend) -> SharedMemory | None:
        """Returns the memory that all ranks share; None where they do not, or some rank is told not to.

        Cost:
            Collective: one or two calls of `all_gather_json`.
        """
        fd = _create(backend.world_size) if backend.rank == 0 else None
        try:
            process = this_process() if _may_share() else ""
            created = None if fd is None else [fd, *_identity(fd)]
            ranks = backend.all_gather_json([process, namespaces(), created])
            processes = [process for process, _, _ in ranks]
            if not all(processes) or len({namespace for _, namespace, _ in ranks}) > 1 or ranks[0][2] is None:
                return None
            number, *identity = ranks[0][2]
            path = f"/proc/{processes[0].split()[-2]}/fd/{number}"
            memory = _map(path, identity, backend.world_size)
            if not all(backend.all_gather_json(memory is not None)) or memory is None:
                return None
            return cls(memory, backend.rank, processes)
        finally:
            if fd is not None:
                os.close(fd)

    def takes(self, buffer: Tensor) -> bool:
        """Whether `start` sums such buffers; the same on all ranks."""
        return (
            buffer.device.type == "cpu"
            and buffer.dtype in _DTYPES
            and buffer.nbytes * len(self._processes) <= MAX_BYTES
            and self._process == os.getpid()  # a forked child is no rank
        )

    def note(self, what: str) -> None:
        """Notes that this rank makes a call, of any collective, for ranks that wait for another one."""
        if self._process != os.getpid():
            return
        self._num_calls += 1
        self._calls[self._num_calls] = what
        self._calls.pop(self._num_calls - _NUM_NOTED, None)
        self._sums.note(self._num_calls, what)

    def start(self, buffer: Tensor) -> SharedSum:
        """Starts summing a contiguous tensor, in place; all ranks start and await the same sums in the same order.

        Raises:
            MismatchError: A rank that has come before sums something else.
        """
        try:
            number = self._sums.start(buffer.data_ptr(), buffer.nbytes, str(buffer.dtype), self._num_calls)
        except RuntimeError as error:
            raise MismatchError(f"the ranks' calls do not match: {error}") from error
        self._started[number] = buffer
        return SharedSum(self, number)

    def poll(self, number: int, seconds: float) -> bool:
        """Waits up to `seconds` for a sum and returns whether it is done.

        Raises:
            MismatchError: A rank makes another call than this one.
            RuntimeError: The process of a rank has ended without its part.
        """
        deadline = time.monotonic() + seconds
        while not self._wait(number, max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
            ended = [rank for rank in self._sums.missing() if has_ended(self._processes[rank])]
            if ended and not self._wait(number, 0.0):
                raise RuntimeError(f"the process of rank {ended[0]} has ended")
            self._compare_calls()
            if time.monotonic() >= deadline:
                return False
        for done in [each for each in self._started if each <= number]:
            del self._started[done]
        return True

    def _wait(self, number: int, seconds: float) -> bool:
        try:
            return self._sums.wait(number, seconds)
        except RuntimeError as error:
            raise MismatchError(f"the ranks' calls do not match: {error}") from error

    def _compare_calls(self) -> None:
        """Raises MismatchError where the last call of another rank is not what this rank called at that place."""
        for rank in range(len(self._processes)):
            number, theirs = self._sums.last_call(rank)
            ours = self._calls.get(number, theirs)
            if theirs != ours:
                raise MismatchError(
                    f"the ranks' calls do not match: rank {rank} calls {theirs} as its collective number {number}, and "
                    f"this rank called {ours}. All ranks must make the same calls in the same order."
                )


class SharedSum:
    """A sum that has been started."""

    def __init__(self, shared: SharedMemory, number: int) -> None:
        self._shared = shared
        self._number = number

    def poll(self, seconds: float) -> bool:
        """Waits up to `seconds` and returns whether it is done; raises as `SharedMemory.poll`."""
        return self._shared.poll(self._number, seconds)


def _may_share() -> bool:
    """Whether this rank is not told otherwise, and its loops in C++ were compiled."""
    try:
        from distopt.backends import _shared_memory  # noqa: F401
    except ImportError as error:
        logger.debug("ranks of this machine sum over the network: %s", error)
        return False
    return os.environ.get(VARIABLE, "1") != "0"


def _create(world_size: int) -> int | None:
    """Creates memory without a name, which ends with the last process that has mapped it; None where that fails."""
    if not _may_share() or not hasattr(os, "memfd_create"):
        return None
    from distopt.backends._shared_memory import Sums

    fd = None
    try:
        fd = os.memfd_create("distopt")
        os.ftruncate(fd, Sums.num_bytes(world_size, SLOT_BYTES))
    except OSError as error:
        logger.debug("ranks of this machine sum over the network: %s", error)
        if fd is not None:
            os.close(fd)
        return None
    return fd


def _map(path: str, identity: Sequence[Any], world_size: int) -> mmap.mmap | None:
    """Maps the memory of rank 0; None where this process may not, or the path leads to anything else."""
    from distopt.backends._shared_memory import Sums

    with suppress(OSError, ValueError):
        if list(_identity(path)) != list(identity):
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if list(_identity(fd)) == list(identity):
                return mmap.mmap(fd, Sums.num_bytes(world_size, SLOT_BYTES))
        finally:
            os.close(fd)
    return None


def _identity(file: int | str) -> tuple[int, int]:
    """Returns what no two open files of a machine have in common: device and inode."""
    status = os.stat(file)
    return status.st_dev, status.st_ino

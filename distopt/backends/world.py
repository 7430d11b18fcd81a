"""What the backends with peers share: waiting with a timeout, naming who is missing, JSON over tensors, the way out."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from distopt.backends.base import BackendError, Handle, Json, Op
from distopt.backends.heartbeat import BEAT_S, Failure, Watch
from distopt.launchers import RankInfo

LINGER = timedelta(seconds=3)
"""How long a failing rank stays for the others to read its cause, and they look for one when a connection closes."""

JSON_HEAD_BYTES = 4096
"""JSON up to this length (less 8 bytes for the length) crosses in one collective, longer in two."""


class Pending(Protocol):
    """A started collective as one library sees it."""

    def poll(self, seconds: float) -> bool:
        """Waits up to `seconds`; True when it is done. Raises RuntimeError when it has failed."""


class WorldHandle:
    """A started collective of a `World`."""

    def __init__(self, world: World, pending: Pending, what: str) -> None:
        self._world, self._pending, self._what = world, pending, what

    def wait(self, timeout: timedelta | None = None) -> None:
        """Returns when the result is there; raises `BackendError` on a timeout, a lost peer or a peer's failure."""
        world, started = self._world, time.monotonic()
        limit_s = (timeout or world.timeout).total_seconds()
        while True:
            left_s = limit_s - (time.monotonic() - started)
            try:
                if self._pending.poll(max(0.0, min(left_s, BEAT_S))):
                    world.waiting -= 1
                    if self._what.startswith("all_reduce"):
                        world.all_reduce_s += time.monotonic() - started
                    return
            except RuntimeError as error:
                raise world.lost(self._what, error) from error
            world.raise_if_failed()
            if left_s <= 0:
                raise world.late(self._what, limit_s)


class World(ABC):
    """A world of several processes; subclasses start its collectives.

    Args:
        rank_info: Rank, world size and what else the launcher told.
        device: Where this rank's parameters live by default.
        timeout: What a wait without a timeout of its own waits for.
    """

    library: ClassVar[str]

    def __init__(self, rank_info: RankInfo, device: torch.device, timeout: timedelta) -> None:
        self.name = self.library
        self.rank, self.world_size = rank_info.rank, rank_info.world_size
        self.device, self.timeout = device, timeout
        self.waiting = 0  # collectives started and not yet seen to be done
        self.all_reduce_s, self.all_reduce_bytes = 0.0, 0
        self.closed = False
        self._watch: Watch | None = None
        self._way_out: WayOut | None = None
        self.local_rank, self.node_rank = rank_info.local_rank or 0, rank_info.node_rank or 0
        self._rank_info = rank_info

    # What a subclass starts.

    @abstractmethod
    def _start_all_reduce(self, tensor: Tensor, op: Op) -> Pending: ...

    @abstractmethod
    def _start_broadcast(self, tensor: Tensor, root: int) -> Pending: ...

    @abstractmethod
    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> Pending: ...

    @abstractmethod
    def _start_exchange(self, tensor: Tensor, peer: int | None, received: Tensor) -> Pending: ...

    @abstractmethod
    def _leave(self) -> None:
        """Ends what this object began."""

    @abstractmethod
    def _make_store(self) -> Store:
        """Returns a store client for the side channel alone; a collective call."""

    @property
    def json_device(self) -> torch.device:
        """The device of the tensors that carry JSON."""
        return torch.device("cpu")

    # The contract.

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Starts combining `tensor` over all ranks, in place."""
        self.all_reduce_bytes += tensor.nbytes
        return self._start("all_reduce", tensor, lambda: self._start_all_reduce(tensor, op))

    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        """Starts overwriting `tensor` in place with rank `root`'s."""
        return self._start(f"broadcast from rank {root}", tensor, lambda: self._start_broadcast(tensor, root))

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        """Returns every rank's `tensor`, stacked in the order of ranks."""
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        tensor = tensor.contiguous()
        self._start("all_gather", tensor, lambda: self._start_all_gather(tensor, gathered)).wait(timeout)
        return gathered

    def exchange(self, tensor: Tensor, peer: int | None, timeout: timedelta | None = None) -> Tensor | None:
        """Swaps `tensor` with rank `peer`'s and returns that."""
        tensor, received = tensor.contiguous(), torch.empty_like(tensor)
        what = "exchange without a partner" if peer is None else f"exchange with rank {peer}"
        self._start(what, tensor, lambda: self._start_exchange(tensor, peer, received)).wait(timeout)
        return None if peer is None else received

    def all_gather_json(self, value: Json, timeout: timedelta | None = None) -> list[Json]:
        """Returns every rank's `value`, in the order of ranks."""
        payload = json.dumps(value).encode()
        head_bytes = JSON_HEAD_BYTES - 8
        head = _bytes(len(payload).to_bytes(8, "little") + payload[:head_bytes], JSON_HEAD_BYTES)
        heads = [bytes(row) for row in self._gather_bytes(head, timeout)]
        lengths = [int.from_bytes(row[:8], "little") for row in heads]
        texts = [row[8 : 8 + length] for row, length in zip(heads, lengths, strict=True)]
        longest = max(lengths)
        if longest > head_bytes:
            rest = self._gather_bytes(_bytes(payload[head_bytes:], longest - head_bytes), timeout)
            texts = [
                text + bytes(row)[: max(0, length - head_bytes)]
                for text, row, length in zip(texts, rest, lengths, strict=True)
            ]
        return [json.loads(text) for text in texts]

    def barrier(self, timeout: timedelta | None = None) -> None:
        """Returns when all ranks have called it."""
        self.all_reduce(torch.zeros(1, device=self.json_device)).wait(timeout)

    def note(self, step: int, phase: str) -> None:
        """Tells the heartbeat where this rank is."""
        if self._watch is not None:
            self._watch.step, self._watch.phase = step, phase

    def fail(self, error: BaseException) -> None:
        """Publishes why this rank stops; stays up to 3 s for the others to read it."""
        if self._watch is not None and not self.closed:
            text = "".join(traceback.format_exception(error))
            self._watch.fail(f"{type(error).__name__}: {error}", text, LINGER.total_seconds())

    def close(self) -> None:
        """Leaves the world; calling it twice does nothing."""
        if self.closed:
            return
        self.closed = True
        if self._watch is not None:
            self._watch.end()
        self.silence()
        if self._way_out is not None:
            self._way_out.remove(stuck=self.waiting > 0)
        if self.waiting == 0:
            self._leave()

    # What subclasses and handles use.

    def open(self) -> None:
        """Starts the heartbeat and the way out; a collective call, made once the collectives work."""
        if self._rank_info.node_rank is None or self._rank_info.local_rank is None:
            hosts = self.all_gather_json(socket.gethostname())
            names = list(dict.fromkeys(hosts))
            if self._rank_info.node_rank is None:
                self.node_rank = names.index(hosts[self.rank])
            if self._rank_info.local_rank is None:
                self.local_rank = hosts[: self.rank].count(hosts[self.rank])
        if self.world_size > 1:
            self._watch = Watch(self._make_store(), self.rank, self.world_size)
            self._way_out = WayOut(self)

    def silence(self) -> None:
        """Ends the heartbeat, and nothing else."""
        if self._watch is not None:
            self._watch.close()

    def raise_if_failed(self) -> None:
        """Raises when a peer has told why it stopped."""
        if self._watch is not None and self._watch.failure is not None:
            raise BackendError(self._second(self._watch.failure))

    def lost(self, what: str, error: Exception) -> BackendError:
        """The error for a collective that the library gave up."""
        where = self._where(what)
        if self._watch is None:
            return BackendError(f"{where} failed: {error}")
        failure = self._watch.look(LINGER.total_seconds())
        if failure is not None:
            return BackendError(self._second(failure))
        return BackendError(f"{where} failed. Missing: {self._watch.describe_missing()}. The library says: {error}")

    def late(self, what: str, limit_s: float) -> BackendError:
        """The error for a collective that did not finish in time."""
        missing = self._watch.describe_missing() if self._watch is not None else "unknown"
        return BackendError(
            f"{self._where(what)} not finished after {limit_s:g} s. Missing: {missing}. If a rank was only slow, give "
            "init() (reduce.timeout_s) a longer timeout; if it left out a call, all ranks must make the same ones."
        )

    def _start(self, what: str, tensor: Tensor, start: Callable[[], Pending]) -> Handle:
        if self.closed:
            raise BackendError(f"{self._where(what)}: this backend was closed.")
        self.raise_if_failed()
        if self._watch is not None:
            self._watch.calls += 1
        self.waiting += 1
        what = f"{what} of {tuple(tensor.shape)} {tensor.dtype}"
        try:
            return WorldHandle(self, start(), what)
        except RuntimeError as error:
            raise self.lost(what, error) from error

    def _gather_bytes(self, data: Tensor, timeout: timedelta | None) -> list[list[int]]:
        rows: list[list[int]] = self.all_gather(data.to(self.json_device), timeout).cpu().tolist()
        return rows

    def _where(self, what: str) -> str:
        watch = self._watch
        location = f", step {watch.step}, phase {watch.phase!r}" if watch is not None else ""
        return f"rank {self.rank} of {self.world_size}{location}: {self.name} {what}"

    def _second(self, failure: Failure) -> str:
        said = f"{failure}. Rank {self.rank} of {self.world_size} stops because of it."
        return said if failure.ended else f"{said}\n--- traceback of rank {failure.rank}\n{failure.traceback.rstrip()}"


class WayOut:
    """How a process of a broken world ends: the cause is told to the others, and no destructor waits for the dead.

    An exception that nobody catches is published before Python reports it. A library's destructors wait for collectives
    that were started and never finished (gloo: up to its timeout), so a process that has such ends by `os._exit`; and
    so does a failed one with a thread that still waits for the store, which Python could not end without an abort.
    """

    def __init__(self, world: World) -> None:
        self._world, self._before, self._failed = world, sys.excepthook, False
        sys.excepthook = self._hook
        atexit.register(self._leave)

    def remove(self, stuck: bool) -> None:
        """Undoes it; a world with collectives left behind keeps the quick exit."""
        if sys.excepthook == self._hook:
            sys.excepthook = self._before
        if not stuck:
            atexit.unregister(self._leave)

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._failed = True
        if not issubclass(kind, KeyboardInterrupt) and not isinstance(error, BackendError):
            self._world.fail(error)
        self._before(kind, error, trace)

    def _leave(self) -> None:
        if self._failed:  # peers that stop because of this rank take no part in an orderly end
            self._world.silence()
        if self._world.waiting > 0 or (self._failed and Watch.is_stuck()):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if not self._failed:
            self._world.close()


def _bytes(data: bytes, length: int) -> Tensor:
    return torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8)

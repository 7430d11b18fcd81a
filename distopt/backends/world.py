"""What the backends with peers share: waits with a timeout, errors that name who is missing, and an orderly exit."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from distopt.backends.base import Backend, BackendError, Handle, MismatchError, Op
from distopt.backends.heartbeat import BEAT_S, Failure, Heartbeat
from distopt.launchers import SINGLE_DEVICE_VARIABLE, RankInfo, has_separate_gpus
from distopt.worker_error import is_permanent, record_error

LINGER = timedelta(seconds=3)
"""How long a failing rank stays for the others to read its cause, and they wait for one when a connection closes."""


class PendingCollective(Protocol):
    """A started collective, as its library offers it."""

    def poll(self, seconds: float) -> bool:
        """Waits up to `seconds` and returns whether it is done; raises RuntimeError where it has failed."""


class WorldHandle:
    """A started collective of a `World`.

    Args:
        world: The world that started it.
        pending: The library's own handle.
        what: The collective with its shape and dtype, for messages.
    """

    def __init__(self, world: World, pending: PendingCollective, what: str) -> None:
        self._world = world
        self._pending = pending
        self._what = what

    def wait(self, timeout: timedelta | None = None) -> None:
        """Returns when the result is there; raises `BackendError` on a timeout, a lost peer or a peer's failure."""
        world = self._world
        started = time.monotonic()
        limit_s = (timeout or world.timeout).total_seconds()

        # The libraries wait in C++ code, which hears of nothing else. So it waits for one heartbeat at a time, and
        # between two of them a failure that another rank has published ends the wait.
        while True:
            left_s = limit_s - (time.monotonic() - started)
            try:
                if self._pending.poll(max(0.0, min(left_s, BEAT_S))):
                    world.num_pending -= 1
                    if self._what.startswith("all_reduce"):
                        world.all_reduce_s += time.monotonic() - started
                    return
            except RuntimeError as error:
                raise world.library_error(self._what, error) from error
            world.raise_if_failed()
            if left_s <= 0:
                raise world.timeout_error(self._what, limit_s)


class World(Backend):
    """A world of several processes; subclasses start its collectives.

    Args:
        rank_info: This process's rank, the world's size and what else is known of it.
        device: Where this rank's parameters live by default; chosen by local rank when None.
        timeout: For every wait that is not given its own.

    Attributes:
        num_pending: Number of collectives that were started and whose wait has not returned.
    """

    def __init__(self, rank_info: RankInfo, *, device: torch.device | None, timeout: timedelta) -> None:
        super().__init__(rank_info, device=device or choose_device(rank_info), timeout=timeout)
        self.num_pending = 0
        self._rank_info = rank_info
        self._heartbeat: Heartbeat | None = None
        self._exit_handler: ExitHandler | None = None

    # What a subclass implements.

    @abstractmethod
    def _start_all_reduce(self, tensor: Tensor, op: Op) -> PendingCollective: ...

    @abstractmethod
    def _start_broadcast(self, tensor: Tensor, root: int) -> PendingCollective: ...

    @abstractmethod
    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> PendingCollective: ...

    @abstractmethod
    def _start_send_recv(self, tensor: Tensor, peer: int | None, received: Tensor) -> PendingCollective: ...

    @abstractmethod
    def _leave(self) -> None:
        """Ends what this object began in the library."""

    @abstractmethod
    def _make_store(self) -> Store:
        """Returns a client of a store for the heartbeat alone; a collective call."""

    # The contract of backends.

    def all_reduce(self, tensor: Tensor, op: Op = "sum") -> Handle:
        """Starts combining `tensor` over all ranks, in place."""
        self.all_reduce_bytes += tensor.nbytes
        return self._start("all_reduce", tensor, lambda: self._start_all_reduce(tensor, op))

    def broadcast(self, tensor: Tensor, root: int = 0) -> Handle:
        """Starts overwriting `tensor` with that of rank `root`."""
        return self._start(f"broadcast from rank {root}", tensor, lambda: self._start_broadcast(tensor, root))

    def all_gather(self, tensor: Tensor, timeout: timedelta | None = None) -> Tensor:
        """Returns every rank's `tensor`, stacked in the order of ranks."""
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        tensor = tensor.contiguous()
        self._start("all_gather", tensor, lambda: self._start_all_gather(tensor, gathered)).wait(timeout)
        return gathered

    def send_recv(self, tensor: Tensor, peer: int | None, timeout: timedelta | None = None) -> Tensor | None:
        """Sends `tensor` to rank `peer` and returns what that rank sends here."""
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        what = "send_recv without a partner" if peer is None else f"send_recv with rank {peer}"
        self._start(what, tensor, lambda: self._start_send_recv(tensor, peer, received)).wait(timeout)
        return None if peer is None else received

    def note(self, step: int, phase: str) -> None:
        """Records where this rank is; costs two assignments, which the heartbeat publishes."""
        if self._heartbeat is not None:
            self._heartbeat.step = step
            self._heartbeat.phase = phase

    def fail(self, error: BaseException) -> None:
        """Publishes why this rank stops; returns once the others have read it, or after 3 s."""
        if self._heartbeat is not None and not self.closed:
            text = "".join(traceback.format_exception(error))
            self._heartbeat.fail(f"{type(error).__name__}: {error}", text, LINGER.total_seconds())

    def close(self) -> None:
        """Leaves the world; calling it twice does nothing."""
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)

        if self._heartbeat is not None:
            self._heartbeat.exit()
        self.stop_heartbeat()
        if self._exit_handler is not None:
            self._exit_handler.remove(keep_quick_exit=self.num_pending > 0)

        # A library that is shut down amid a collective waits for its peers, which may be dead.
        if self.num_pending == 0:
            self._leave()

    # What subclasses and handles use.

    def open(self) -> None:
        """Finds this rank's number on its host where the launcher did not say, and starts the heartbeat.

        A collective call, made once the collectives work.
        """
        if self._rank_info.node_rank is None or self._rank_info.local_rank is None:
            hosts = self.all_gather_json(socket.gethostname())
            names = list(dict.fromkeys(hosts))
            if self._rank_info.node_rank is None:
                self.node_rank = names.index(hosts[self.rank])
            if self._rank_info.local_rank is None:
                self.local_rank = hosts[: self.rank].count(hosts[self.rank])
        if self.world_size > 1:
            self._heartbeat = Heartbeat(self._make_store(), self.rank, self.world_size)
            self._exit_handler = ExitHandler(self)
        else:
            atexit.register(self.close)  # gloo's threads may abort a process that ends with its group open

    def stop_heartbeat(self) -> None:
        """Ends the heartbeat, and nothing else."""
        if self._heartbeat is not None:
            self._heartbeat.close()

    def raise_if_failed(self) -> None:
        """Raises the failure that another rank has published, if there is one."""
        if self._heartbeat is not None and self._heartbeat.failure is not None:
            raise BackendError(self._describe_failure(self._heartbeat.failure))

    def library_error(self, what: str, error: Exception) -> BackendError:
        """Returns the error for a collective that the library gave up, with the failure behind it if there is one."""
        collective = self._describe(what)
        if isinstance(error, MismatchError):  # it says all that there is to say
            return MismatchError(f"{collective}: {error}")
        if self._heartbeat is None:
            return BackendError(f"{collective} failed: {error}")

        # What the library reports is mostly a closed connection; the rank that closed it may have said why.
        cause = self._heartbeat.failure_or_missing(LINGER.total_seconds())
        if not isinstance(cause, str):
            return BackendError(self._describe_failure(cause))
        return BackendError(f"{collective} failed while waiting for {cause}. The library says: {error}")

    def timeout_error(self, what: str, limit_s: float) -> BackendError:
        """Returns the error for a collective that did not finish in time."""
        missing = self._heartbeat.describe_missing() if self._heartbeat is not None else "the others"
        return BackendError(
            f"{self._describe(what)} timed out after {limit_s:g} s, waiting for {missing}. If it is just slow, raise "
            "init(timeout=...) or reduce.timeout_s; otherwise check that all ranks make the same calls."
        )

    def _start(self, what: str, tensor: Tensor, start: Callable[[], PendingCollective], noted: str = "") -> Handle:
        if self.closed:
            raise BackendError(f"{self._describe(what)}: this backend was closed.")
        self.raise_if_failed()
        if self._heartbeat is not None:
            self._heartbeat.calls += 1
        self.num_pending += 1

        self._note_call(noted or what, tensor)
        what = f"{what} of {tuple(tensor.shape)} {tensor.dtype}"
        for observe in _observers:
            observe(what)
        try:
            return WorldHandle(self, start(), what)
        except RuntimeError as error:
            raise self.library_error(what, error) from error

    def _note_call(self, what: str, tensor: Tensor) -> None:
        """Is told of each collective before it is started."""

    def _describe(self, what: str) -> str:
        beat = self._heartbeat
        location = f", step {beat.step}, phase {beat.phase!r}" if beat is not None else ""
        return f"rank {self.rank} of {self.world_size}{location}: {self.name} {what}"

    def _describe_failure(self, failure: Failure) -> str:
        text = f"{failure}. Rank {self.rank} of {self.world_size} stops because of it."
        if failure.exited:
            return text
        return f"{text}\n--- traceback of rank {failure.rank}\n{failure.traceback.rstrip()}"


_observers: list[Callable[[str], None]] = []


@contextmanager
def observing_collectives(observe: Callable[[str], None]) -> Iterator[None]:
    """Calls `observe` with each collective that is started meanwhile, whichever library it is of."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


class ExitHandler:
    """How a process of a broken world ends: the others learn the cause, and no destructor waits for dead peers.

    An uncaught exception is published before Python reports it. A library's destructors wait for collectives that were
    started and never finished (gloo: up to its timeout), so a process that has such ends by `os._exit`. So does a
    failed process with a thread that still waits for the store, since Python could not end that without an abort.

    Args:
        world: The world whose process this is.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._previous_hook = sys.excepthook
        self._failed = False
        sys.excepthook = self._publish
        atexit.register(self._leave)

    def remove(self, keep_quick_exit: bool) -> None:
        """Restores what was there before; a world with unfinished collectives keeps the quick exit."""
        if sys.excepthook == self._publish:
            sys.excepthook = self._previous_hook
        if not keep_quick_exit:
            atexit.unregister(self._leave)

    def _publish(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Stands in for `sys.excepthook`. Most BackendErrors are what this rank learned from another, not its own."""
        self._failed = True
        if not issubclass(kind, KeyboardInterrupt):
            # PeerError, which a layer above defines, tells of another rank as well. A mismatch is this rank's finding.
            names = {base.__name__ for base in kind.__mro__}
            from_peer = bool(names & {"BackendError", "PeerError"}) and not isinstance(error, MismatchError)
            permanent = not from_peer and is_permanent(error, in_first_step=False)
            record_error(error, from_peer=from_peer, permanent=permanent)
            if not isinstance(error, BackendError) or isinstance(error, MismatchError):
                self._world.fail(error)
        self._previous_hook(kind, error, trace)

    def _leave(self) -> None:
        if self._failed:  # peers that stop because of this rank take no part in an orderly end
            self._world.stop_heartbeat()
        if self._world.num_pending > 0 or (self._failed and Heartbeat.is_stuck()):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if not self._failed:
            self._world.close()


def refuse_split_world(backend: World, rank_info: RankInfo | None) -> None:
    """Closes a backend of another size than the launcher's, and raises: its processes did not find each other.

    MPI processes that were started by the mpirun of another MPI than their library's are each alone in a world of one.
    Training would run as many times as there are processes, and each would write the same files.
    """
    if rank_info is None or rank_info.world_size == backend.world_size:
        return
    backend.close()
    raise BackendError(
        f"{rank_info.launcher} started {rank_info.world_size} workers, but this one is in a world of "
        f"{backend.world_size} over {backend.name}. Check that the library is built for the MPI whose mpirun or srun "
        "started it, use that MPI's mpirun, or choose another backend."
    )


def choose_device(rank_info: RankInfo) -> torch.device:
    """Returns this process's GPU when the machine has one for each of its processes, else the CPU.

    Where each process sees only what is its own, as tasks of `srun --gpus-per-task` do, that is its first.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank = rank_info.local_rank or 0
    if num_gpus and SINGLE_DEVICE_VARIABLE in os.environ:
        return torch.device("cuda", 0)
    if num_gpus and num_gpus >= (rank_info.local_size or local_rank + 1):
        return torch.device("cuda", local_rank)
    if num_gpus and has_separate_gpus(rank_info, os.environ):
        return torch.device("cuda", 0)
    return torch.device("cpu")

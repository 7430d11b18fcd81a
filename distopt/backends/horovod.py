"""Horovod as a backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from distopt.backends.base import DEFAULT_TIMEOUT, BackendError, Op
from distopt.backends.heartbeat import start_store
from distopt.backends.world import PendingCollective, World, refuse_split_world
from distopt.launchers import RankInfo

INSTALL = (
    "Horovod is not installed for this torch. `make setup-dev` builds it, or `python tools/build_horovod.py` into the "
    "current environment; or choose the backend torch_dist, which needs nothing."
)


def import_horovod() -> Any:
    """Returns the module `horovod.torch`.

    Raises:
        BackendError: It is not installed, or was built for another torch; says how to build it.
    """
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise BackendError(f"{INSTALL} ({error})") from error
    return hvd


class Horovod(World):
    """A Horovod world, or one of its process sets.

    Collectives are named by kind, size and dtype. Ranks that make different calls then wait for each other, and time
    out with a message, where gloo would add unlike tensors. Names that repeat let Horovod's response cache work.

    Args:
        process_set: A `horovod.torch.ProcessSet`; the global one when None.
        device: Where parameters live by default; chosen by local rank when None.
        timeout: For every wait that is not given its own; under its Gloo controller Horovod itself has no timeout.
        owns_library: Whether `close` shuts Horovod down.

    Raises:
        BackendError: Horovod is not installed, or this rank is not in `process_set`.
    """

    name = "horovod"

    def __init__(
        self,
        *,
        process_set: Any = None,
        device: torch.device | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        owns_library: bool = False,
    ) -> None:
        self._hvd = hvd = import_horovod()
        if process_set is not None and process_set.process_set_id is None:
            raise BackendError(f"{process_set} is not known to Horovod: give it to hvd.init(process_sets=[...]).")
        if process_set is not None and not process_set.included():
            raise BackendError(
                f"rank {hvd.rank()} of {hvd.size()} is not in the process set {process_set.ranks} that it was given. "
                "Use the set only on its own ranks (`if process_set.included():`), and another one on the others."
            )

        self._set = process_set or hvd.global_process_set
        self._owns_library = owns_library
        rank, world_size = (hvd.rank(), hvd.size()) if process_set is None else (process_set.rank(), process_set.size())
        rank_info = RankInfo("horovod", rank, world_size, hvd.local_rank(), hvd.local_size(), hvd.cross_rank())
        super().__init__(rank_info, device=device, timeout=timeout)

        self._ops = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        self._in_flight: dict[str, int] = {}
        self.open()

    @classmethod
    def start(cls, rank_info: RankInfo | None, *, timeout: timedelta = DEFAULT_TIMEOUT) -> Self:
        """Calls `hvd.init()` and returns the backend.

        Raises:
            BackendError: Horovod is not installed, or found another number of ranks than the launcher started.
        """
        hvd = import_horovod()
        owns_library = not hvd.is_initialized()
        hvd.init()
        backend = cls(timeout=timeout, owns_library=owns_library)
        if backend.device.type == "cuda":
            torch.cuda.set_device(backend.device)
        refuse_split_world(backend, rank_info)
        return backend

    def _start_all_reduce(self, tensor: Tensor, op: Op) -> PendingCollective:
        # Horovod's torch binding has no bfloat16: it is summed as float32, for twice the bytes.
        carried = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        name = self._unique_name(op, tensor)
        handle = self._hvd.allreduce_async_(carried, op=self._ops[op], name=name, process_set=self._set)
        return _HorovodPending(self, name, handle, tensor.copy_ if carried is not tensor else None)

    def _start_broadcast(self, tensor: Tensor, root: int) -> PendingCollective:
        name = self._unique_name(f"broadcast{root}", tensor)
        root = self._set.ranks[root] if self._set.ranks else root
        handle = self._hvd.broadcast_async_(_as_float16(tensor), root, name=name, process_set=self._set)
        return _HorovodPending(self, name, handle)

    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> PendingCollective:
        name = self._unique_name("gather", tensor)
        handle = self._hvd.allgather_async(_as_float16(tensor).reshape(1, -1), name=name, process_set=self._set)

        def store(rows: Tensor) -> None:
            _as_float16(gathered).copy_(rows.reshape(gathered.shape))

        return _HorovodPending(self, name, handle, store)

    def _start_send_recv(self, tensor: Tensor, peer: int | None, received: Tensor) -> PendingCollective:
        # Horovod has no send and receive: this is an all-to-all in which each rank sends all of it to its partner.
        splits = torch.zeros(self.world_size, dtype=torch.int32)
        if peer is not None:
            splits[peer] = tensor.numel()
        sent = _as_float16(tensor).reshape(-1) if peer is not None else _as_float16(tensor.new_empty(0))
        name = self._unique_name("send_recv", tensor)
        handle = self._hvd.alltoall_async(sent, splits=splits, name=name, process_set=self._set)

        def store(result: Any) -> None:
            if peer is not None:
                _as_float16(received).copy_(result[0].reshape(received.shape))

        return _HorovodPending(self, name, handle, store)

    def _make_store(self) -> Store:
        return start_store(self.rank, self.all_gather_json)

    def _leave(self) -> None:
        if self._owns_library and self._hvd.is_initialized():
            self._hvd.shutdown()

    def _unique_name(self, kind: str, tensor: Tensor) -> str:
        """A name that no collective in flight has, equal on all ranks that make equal calls in one order."""
        name = f"distopt.{kind}.{tensor.dtype}.{tensor.numel()}"
        count = self._in_flight.get(name, 0)
        self._in_flight[name] = count + 1
        return f"{name}.{count}"

    def take_result(self, name: str, handle: Any) -> Any:
        """Returns a finished collective's result; raises RuntimeError where it failed."""
        self._in_flight[name.rpartition(".")[0]] -= 1
        return self._hvd.synchronize(handle)

    def is_done(self, handle: Any) -> bool:
        """Returns whether `take_result` would return at once."""
        return bool(self._hvd.poll(handle))


class _HorovodPending:
    """A handle of Horovod, and what becomes of its result."""

    def __init__(self, world: Horovod, name: str, handle: Any, store: Callable[[Any], object] | None = None) -> None:
        self._world = world
        self._name = name
        self._handle = handle
        self._store = store

    def poll(self, seconds: float) -> bool:
        # Horovod offers no wait with a timeout. Most collectives end within microseconds of each other on all ranks,
        # so the pauses start short, and grow for those that do not.
        deadline = time.monotonic() + seconds
        pause_s = 2e-5
        while not self._world.is_done(self._handle):
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, 1e-3)

        result = self._world.take_result(self._name, self._handle)
        if self._store is not None:
            self._store(result)
        return True


def _as_float16(tensor: Tensor) -> Tensor:
    """The memory of a bfloat16 tensor in a type of that size that Horovod can carry; other tensors as they are."""
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor

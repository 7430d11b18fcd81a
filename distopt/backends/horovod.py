"""Horovod as a backend."""

from __future__ import annotations

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

MEND = (
    "Horovod is not installed for this torch. `make setup-dev` builds it, or `python tools/build_horovod.py` into the "
    "environment at hand; or choose the backend torch_dist, which needs nothing."
)


def import_horovod() -> Any:
    """Returns `horovod.torch`.

    Raises:
        BackendError: It is not installed, or was built for another torch; says how to build it.
    """
    try:
        import horovod.torch as hvd
    except ImportError as error:
        raise BackendError(f"{MEND} ({error})") from error
    return hvd


class Horovod(World):
    """A Horovod world, or one of its process sets.

    Collectives are named by kind, size and dtype, so ranks that make different calls wait for each other (and time out,
    with a message) where gloo would add unlike tensors; equal names let Horovod's response cache do its work.

    Args:
        process_set: A `horovod.torch.ProcessSet`; the global one when None.
        device: Where parameters live by default; chosen by local rank when None.
        timeout: For every wait; Horovod itself waits for ever under its Gloo controller.
        own: Whether `close` shuts Horovod down.
    """

    library = "horovod"

    def __init__(
        self,
        *,
        process_set: Any = None,
        device: torch.device | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        own: bool = False,
    ) -> None:
        self._hvd = hvd = import_horovod()
        if process_set is not None and process_set.process_set_id is None:
            raise BackendError(f"{process_set} is not known to Horovod: give it to hvd.init(process_sets=[...]).")
        if process_set is not None and not process_set.included():
            raise BackendError(
                f"rank {hvd.rank()} of {hvd.size()} is not in the process set {process_set.ranks} that it was given. "
                "Use it on its own ranks alone (`if process_set.included():`), and another on the others."
            )
        self._set, self._own = process_set or hvd.global_process_set, own
        rank, world_size = (hvd.rank(), hvd.size()) if process_set is None else (process_set.rank(), process_set.size())
        rank_info = RankInfo("horovod", rank, world_size, hvd.local_rank(), hvd.local_size(), hvd.cross_rank())
        super().__init__(rank_info, device or choose_device(rank_info), timeout)
        self._ops = {"sum": hvd.Sum, "min": hvd.Min, "max": hvd.Max}
        self._in_flight: dict[str, int] = {}
        self.open()

    @classmethod
    def start(cls, *, device: torch.device | None = None, timeout: timedelta = DEFAULT_TIMEOUT) -> Horovod:
        """Calls `hvd.init()` and returns the backend."""
        hvd = import_horovod()
        own = not hvd.is_initialized()
        hvd.init()
        backend = cls(device=device, timeout=timeout, own=own)
        if backend.device.type == "cuda":
            torch.cuda.set_device(backend.device)
        return backend

    def _start_all_reduce(self, tensor: Tensor, op: Op) -> Pending:
        # Horovod's torch binding has no bfloat16: it is summed as float32, for twice the bytes.
        carried = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        name = self._name(f"{op}", tensor)
        handle = self._hvd.allreduce_async_(carried, op=self._ops[op], name=name, process_set=self._set)
        return self._pend(name, handle, tensor.copy_ if carried is not tensor else None)

    def _start_broadcast(self, tensor: Tensor, root: int) -> Pending:
        name = self._name(f"broadcast{root}", tensor)
        root = self._set.ranks[root] if self._set.ranks else root
        return self._pend(name, self._hvd.broadcast_async_(_bits(tensor), root, name=name, process_set=self._set))

    def _start_all_gather(self, tensor: Tensor, gathered: Tensor) -> Pending:
        name = self._name("gather", tensor)
        handle = self._hvd.allgather_async(_bits(tensor).reshape(1, -1), name=name, process_set=self._set)
        return self._pend(name, handle, lambda rows: _bits(gathered).copy_(rows.reshape(gathered.shape)))

    def _start_exchange(self, tensor: Tensor, peer: int | None, received: Tensor) -> Pending:
        # Horovod has no send and receive: an all-to-all in which each rank sends all to its partner alone.
        splits = torch.zeros(self.world_size, dtype=torch.int32)
        if peer is not None:
            splits[peer] = tensor.numel()
        sent = _bits(tensor).reshape(-1) if peer is not None else _bits(tensor.new_empty(0))
        name = self._name("exchange", tensor)
        handle = self._hvd.alltoall_async(sent, splits=splits, name=name, process_set=self._set)

        def store(result: Any) -> None:
            if peer is not None:
                _bits(received).copy_(result[0].reshape(received.shape))

        return self._pend(name, handle, store)

    def _make_store(self) -> Store:
        return make_side_store(self.rank, self.all_gather_json)

    def _leave(self) -> None:
        if self._own and self._hvd.is_initialized():
            self._hvd.shutdown()

    def _name(self, what: str, tensor: Tensor) -> str:
        name = f"distopt.{what}.{tensor.dtype}.{tensor.numel()}"
        count = self._in_flight.get(name, 0)
        self._in_flight[name] = count + 1
        return f"{name}.{count}"

    def _pend(self, name: str, handle: Any, store: Any = None) -> Pending:
        return _HorovodPending(self, name.rpartition(".")[0], handle, store)

    def done(self, name: str, handle: Any) -> Any:
        """Takes a finished collective's result; raises RuntimeError when it failed."""
        self._in_flight[name] -= 1
        return self._hvd.synchronize(handle)

    def is_done(self, handle: Any) -> bool:
        """Whether `done` would return at once."""
        return bool(self._hvd.poll(handle))


class _HorovodPending:
    def __init__(self, world: Horovod, name: str, handle: Any, store: Any) -> None:
        self._world, self._name, self._handle, self._store = world, name, handle, store

    def poll(self, seconds: float) -> bool:
        deadline, pause_s = time.monotonic() + seconds, 2e-5
        while not self._world.is_done(self._handle):
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, 1e-3)
        result = self._world.done(self._name, self._handle)
        if self._store is not None:
            self._store(result)
        return True


def _bits(tensor: Tensor) -> Tensor:
    """The same memory in a type that Horovod can carry."""
    return tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor

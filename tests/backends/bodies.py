"""What one rank does in the backends' conformance suite."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch

from distopt.backends import Backend, BackendError, current
from distopt.backends.world import World, WorldHandle

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]


def collectives() -> str:
    """Checks every collective of the contract against what it must give; returns the backend's name."""
    backend = current()
    assert isinstance(backend, Backend)
    rank, size = backend.rank, backend.world_size
    for dtype in DTYPES:
        for shape in [(), (1,), (3, 5), (1000,)]:
            tensor = torch.full(shape, rank + 1, dtype=dtype)
            backend.all_reduce(tensor).wait()
            torch.testing.assert_close(tensor, torch.full(shape, size * (size + 1) // 2, dtype=dtype))
    for op, expected in (("min", 1), ("max", size), ("sum", size * (size + 1) // 2)):
        tensor = torch.full((7,), rank + 1.0)
        backend.all_reduce(tensor, op).wait(timedelta(seconds=20))
        assert tensor.tolist() == [expected] * 7
    for root in range(size):
        tensor = torch.full((2, 3), float(rank))
        backend.broadcast(tensor, root).wait()
        assert tensor.eq(root).all()
    gathered = backend.all_gather(torch.tensor([[rank, -rank]]))
    assert gathered.tolist() == [[[each, -each]] for each in range(size)]
    backend.barrier()
    return backend.name


def several_in_flight() -> None:
    """Starts collectives together and waits for them in another order."""
    backend = current()
    tensors = [torch.full((size,), float(backend.rank)) for size in (10, 1000, 10, 100_000)]
    handles = [backend.all_reduce(tensor) for tensor in tensors]
    for tensor, handle in reversed(list(zip(tensors, handles, strict=True))):
        handle.wait()
        assert tensor.eq(sum(range(backend.world_size))).all()


def exchanges() -> None:
    """Swaps with every partner; a rank without one takes part."""
    backend = current()
    for distance in range(1, backend.world_size):
        peer = backend.rank ^ distance
        partner = peer if peer < backend.world_size else None
        received = backend.exchange(torch.full((3, 2), float(backend.rank)), partner)
        if partner is None:
            assert received is None
        else:
            assert received is not None and received.eq(partner).all()


def waits_that_run_out_are_no_failures() -> None:
    """Waits in slices that end when the result comes: the slice's end must not be taken for the collective's."""
    backend = current()
    for _ in range(200):
        tensor = torch.ones(1)
        if backend.rank == 1:
            time.sleep(0.002)  # so that the first slice of the others ends about now
        handle = backend.all_reduce(tensor)
        if isinstance(backend, World) and isinstance(handle, WorldHandle):
            while not handle._pending.poll(0.002):
                pass
            backend.waiting -= 1
        assert tensor.eq(backend.world_size).all()


def json_of_all_sizes() -> None:
    """Gathers JSON shorter and longer than one collective holds, and from some ranks only."""
    backend = current()
    for length in (0, 1, 4080, 4088, 4089, 100_000):
        values = backend.all_gather_json({"rank": backend.rank, "text": "ü" * (length * (1 + backend.rank) // 2)})
        assert [value["rank"] for value in values] == list(range(backend.world_size))
        assert [len(value["text"]) for value in values] == [length * (1 + r) // 2 for r in range(backend.world_size)]
    assert backend.all_gather_json(None if backend.rank else [1.5, "a"])[0] == [1.5, "a"]


def collective_left_out() -> str:
    """Rank 1 leaves out a collective; the others name it, and the world goes on when it comes after all."""
    backend = current()
    backend.note(7, "reduce" if backend.rank != 1 else "model")
    backend.barrier()
    message, tensor = "", torch.full((4,), 1.0)
    if backend.rank != 1:
        handle = backend.all_reduce(tensor)
        with pytest.raises(BackendError) as raised:
            handle.wait(timedelta(seconds=1.5))
        message = str(raised.value)
        handle.wait()
    else:
        time.sleep(4.0)  # the fault itself: this rank is late by more than the others' patience
        backend.all_reduce(tensor).wait()
    assert tensor.eq(backend.world_size).all()
    return message


CONTRACT = [collectives, several_in_flight, waits_that_run_out_are_no_failures, exchanges, json_of_all_sizes]

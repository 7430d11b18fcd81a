"""The contract of backends: one suite that every backend passes with 1, 2 and 4 ranks, a user's own too."""

from __future__ import annotations

import re
import time
from datetime import timedelta

import pytest
import torch

from distopt.backends import Backend, BackendError, Handle, current, init
from distopt.backends.base import JSON_HEAD_BYTES
from distopt.backends.world import World, WorldHandle
from distopt.launchers import RankInfo
from tests import workers

REFERENCE = "tests.backends.store_backend:StoreBackend"
WORLDS = [
    pytest.param(
        (kind, size),
        id=f"{kind.rpartition(':')[2]}-{size}",
        marks=() if size == 2 or (kind, size) in workers.QUICK_WORLDS else pytest.mark.slow,
    )
    for kind in ("torch_dist", "torch_dist-network", "horovod", "mpi", REFERENCE)
    for size in (2, 4, 1)
]
OTHER_STARTS = [("horovod-mpi", 2), ("mpirun-horovod", 2)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]


def _run_collectives() -> str:
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


def _run_several_in_flight() -> None:
    """Starts collectives together and waits for them in another order."""
    backend = current()
    tensors = [torch.full((size,), float(backend.rank)) for size in (10, 1000, 10, 100_000)]
    handles = [backend.all_reduce(tensor) for tensor in tensors]
    for tensor, handle in reversed(list(zip(tensors, handles, strict=True))):
        handle.wait()
        assert tensor.eq(sum(range(backend.world_size))).all()


def _run_send_recv() -> None:
    """Swaps with every partner; a rank without one takes part."""
    backend = current()
    for distance in range(1, backend.world_size):
        peer = backend.rank ^ distance
        partner = peer if peer < backend.world_size else None
        received = backend.send_recv(torch.full((3, 2), float(backend.rank)), partner)
        if partner is None:
            assert received is None
        else:
            assert received is not None and received.eq(partner).all()


def _run_waits_that_time_out() -> None:
    """Waits in slices that end when the result comes: the slice's end must not be taken for the collective's."""
    backend = current()
    # The reference waits in a store of torch, where each wait that times out takes a tenth of a second.
    for _ in range(200 if isinstance(backend, World) else 20):
        tensor = torch.ones(1)
        if backend.rank == 1:
            time.sleep(0.002)  # so that the first slice of the others ends about now
        handle = backend.all_reduce(tensor)
        if isinstance(backend, World) and isinstance(handle, WorldHandle):
            while not handle._pending.poll(0.002):
                pass
            backend.num_pending -= 1
        else:
            _wait_in_slices(handle)
        assert tensor.eq(backend.world_size).all()


def _wait_in_slices(handle: Handle) -> None:
    while True:
        try:
            handle.wait(timedelta(milliseconds=2))
            return
        except BackendError as error:
            assert "are missing" in str(error)


def _run_json_of_all_sizes() -> None:
    """Gathers JSON shorter and longer than one collective holds, and from some ranks only."""
    backend = current()
    head = JSON_HEAD_BYTES - 8
    for length in (0, 1, head - 8, head, head + 1, 100_000):
        values = backend.all_gather_json({"rank": backend.rank, "text": "ü" * (length * (1 + backend.rank) // 2)})
        assert [value["rank"] for value in values] == list(range(backend.world_size))
        assert [len(value["text"]) for value in values] == [length * (1 + r) // 2 for r in range(backend.world_size)]
    assert backend.all_gather_json(None if backend.rank else [1.5, "a"])[0] == [1.5, "a"]


def _run_late_rank() -> str:
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


CONTRACT = [_run_collectives, _run_several_in_flight, _run_waits_that_time_out, _run_send_recv, _run_json_of_all_sizes]


@pytest.fixture(scope="module", params=WORLDS)
def world(request: pytest.FixtureRequest) -> tuple[str, int]:
    """Tests of one world run one after the other, so that it starts once."""
    kind_and_size: tuple[str, int] = request.param
    return kind_and_size


@pytest.mark.parametrize("body", CONTRACT, ids=lambda body: body.__name__)
def test_every_backend_does_the_same(world, body):
    results = workers.world(*world).run(body, timeout_s=90)
    assert all(result == results[0] for result in results)


def test_late_rank_is_named_and_the_world_resumes(world):
    kind, size = world
    if size == 1:
        return
    messages = workers.world(kind, size).run(_run_late_rank)
    for rank, message in enumerate(messages):
        if rank == 1:
            continue
        if kind == REFERENCE:
            assert re.fullmatch(rf"call \d+: rank\(s\) \[1\] of {size} are missing", message)
        else:
            assert "timed out after 1.5 s, waiting for rank 1 (alive, at step 7, phase 'model'). If it is" in message


@pytest.mark.slow
@pytest.mark.parametrize("started", OTHER_STARTS, ids=lambda world: f"{world[0]}-{world[1]}")
def test_other_launchers_of_horovod_do_the_same(started):
    results = workers.world(*started).run(_run_collectives, timeout_s=90)
    assert results == ["horovod", "horovod"]


@pytest.mark.parametrize("body", CONTRACT, ids=lambda body: body.__name__)
def test_a_lone_process_does_the_same(body):
    backend = init("single")
    body()
    backend.close()


class Least(Backend):
    """Only what a backend must have."""

    name = "least"

    @classmethod
    def start(cls, rank_info, *, timeout):
        return cls(rank_info, timeout=timeout)

    def all_reduce(self, tensor, op="sum"):
        raise NotImplementedError

    def broadcast(self, tensor, root=0):
        raise NotImplementedError

    def all_gather(self, tensor, timeout=None):
        return torch.stack([tensor] * self.world_size)


def test_members_that_a_backend_may_leave_out_have_defaults():
    backend = Least.start(RankInfo("a test", 1, 3, local_rank=0, node_rank=1), timeout=timedelta(seconds=7))
    assert (backend.rank, backend.world_size, backend.local_rank, backend.node_rank) == (1, 3, 0, 1)
    assert (backend.timeout, backend.closed) == (timedelta(seconds=7), False)
    assert (backend.device, backend.control_device) == (torch.device("cpu"), torch.device("cpu"))
    assert (backend.all_reduce_s, backend.all_reduce_bytes) == (0.0, 0)
    backend.note(3, "model")
    backend.fail(ValueError("no"))
    assert backend.all_gather_json({"a": [1, None]}) == [{"a": [1, None]}] * 3
    assert backend.send_recv(torch.tensor([2.0]), 2).tolist() == [2.0]
    backend.close()
    backend.close()
    assert backend.closed

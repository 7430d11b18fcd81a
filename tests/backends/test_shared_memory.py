"""Sums over ranks of one machine: the bits, ranks that end or wait, and worlds that cannot share memory."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile

import pytest
import torch

from distopt.backends import current, init
from distopt.backends.process_ends import this_process
from distopt.backends.shared_memory import MAX_BYTES, SLOT_BYTES, VARIABLE, SharedMemory
from tests.workers import backend_name, run_script, world

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux has the futexes")
_shared_memory = pytest.importorskip("distopt.backends._shared_memory", reason="not compiled here")


LENGTHS = [1, 0, 3, 1000, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 5 * SLOT_BYTES // 8 + 7]
DTYPES = [torch.float32, torch.float64, torch.int64]


def _shares(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    return [(torch.randn(length, dtype=torch.float64) * 1e3).to(dtype) for length in LENGTHS]


def _run_sums(dtype: torch.dtype, is_shared: bool) -> list[bytes]:
    """Sums of several sizes, all under way at once and waited for in another order."""
    backend = current()
    tensors = _shares(backend.rank, dtype)
    assert (backend._shared is not None) == is_shared
    handles = [backend.sum_buffer(tensor) for tensor in tensors]
    for handle in reversed(handles):
        handle.wait()
    return [tensor.numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_those_of_torch_in_the_order_of_ranks_in_every_bit(size, dtype):
    expected, *others = (_shares(rank, dtype) for rank in range(size))
    for share in others:
        for total, addend in zip(expected, share, strict=True):
            total += addend
    results = world("torch_dist", size).run(_run_sums, dtype, True)
    assert results == [[total.numpy().tobytes() for total in expected]] * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_two_ranks_are_those_of_the_network_in_every_bit(dtype):
    on_network = world("torch_dist-network", 2).run(_run_sums, dtype, False)
    assert world("torch_dist", 2).run(_run_sums, dtype, True) == on_network


SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-42, -1e-42, 3.4e38]
PAIRS = torch.tensor([[a, b] for a in SPECIAL for b in SPECIAL])


def _run_special() -> list[int]:
    mine = PAIRS[:, current().rank].contiguous()
    current().sum_buffer(mine).wait()
    return mine.view(torch.int32).tolist()


def test_sums_of_special_numbers_are_those_of_ieee_754():
    ours, theirs = world("torch_dist", 2).run(_run_special)
    assert ours == theirs
    torch.testing.assert_close(
        torch.tensor(ours).int().view(torch.float32), PAIRS.sum(1), rtol=0, atol=0, equal_nan=True
    )
    negative_zero = SPECIAL.index(-0.0) * len(SPECIAL) + SPECIAL.index(-0.0)
    assert ours[negative_zero] == -(1 << 31)


def _run_many(count: int) -> None:
    """Ranks that are late in turns, so that each waits for free slots, for the others' parts, and on the futex."""
    backend = current()
    for number in range(count):
        if number % 7 == backend.rank:
            time.sleep(0.002)
        tensor = torch.full((1 + number % 50,), float(number))
        backend.sum_buffer(tensor).wait()
        assert tensor.eq(number * backend.world_size).all()


@pytest.mark.parametrize("size", [2, 4])
def test_late_ranks_never_change_a_sum(size):
    world("torch_dist", size).run(_run_many, 1500)


def _run_threads() -> None:
    backend = current()
    handles = [backend.sum_buffer(torch.full((SLOT_BYTES,), float(number))) for number in range(4)]
    threads = [threading.Thread(target=handle.wait) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.num_pending == 0


def test_threads_may_wait_for_sums_at_once():
    world("torch_dist", 2).run(_run_threads)


def _run_dropped() -> None:
    """A handle that nobody keeps: its tensor stays where it is until the sum is done."""
    backend = current()
    backend.sum_buffer(torch.ones(3 * SLOT_BYTES))
    backend.num_pending -= 1
    kept = torch.ones(3)
    backend.sum_buffer(kept).wait()
    assert kept.eq(backend.world_size).all()


def test_sum_whose_handle_is_dropped_does_not_hold_up_the_next():
    world("torch_dist", 2).run(_run_dropped)


def _run_others() -> None:
    """What memory does not take goes over the network, in whatever order it comes between the rest."""
    backend = current()
    shared = backend._shared
    several, half = torch.ones(4, 6), torch.ones(5, dtype=torch.bfloat16)
    flags, least = torch.tensor([backend.rank], dtype=torch.int32), torch.tensor([1.0 + backend.rank])
    assert shared.takes(several) and not shared.takes(half) and not shared.takes(flags)
    assert not shared.takes(torch.empty(MAX_BYTES // 8 + 1)) and not shared.takes(several.to("meta"))
    again = several.clone()
    handles = [backend.sum_buffer(several), backend.sum_buffer(half), backend.sum_buffer(again)]
    handles += [backend.sum_buffer(flags), backend.all_reduce(least, "min")]
    for handle in handles:
        handle.wait()
    assert several.eq(2).all() and again.eq(2).all() and half.eq(2).all() and flags.eq(1).all() and least.eq(1)


def test_what_memory_does_not_take_goes_over_the_network():
    world("torch_dist", 2).run(_run_others)


# Ranks that end.


def _run_until_killed(rank: str, signal_name: str) -> None:
    backend = init(backend_name(), timeout=timedelta(seconds=60))
    assert backend._shared is not None
    backend.barrier()
    if backend.rank == int(rank):
        os.kill(os.getpid(), getattr(signal, signal_name))
    started = time.monotonic()
    try:
        backend.sum_buffer(torch.ones(5 * SLOT_BYTES)).wait()
    finally:
        print(f"waited {time.monotonic() - started:.1f} s", flush=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_named_at_once(rank):
    statuses, started = run_script("torch_dist", 2, _run_until_killed, str(rank), "SIGKILL")
    output = started.output(1 - rank)
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
    # Rank 0 takes the store with it, and with the store what tells the ranks apart.
    assert f"the process of rank {rank} has ended" in output
    waited = float(output.partition("waited ")[2].split()[0])
    assert waited < 10


def _run_leaves_early() -> None:
    backend = init(backend_name(), timeout=timedelta(seconds=60))
    backend.barrier()
    if backend.rank == 0:
        backend.sum_buffer(torch.ones(3)).wait()


def test_rank_that_leaves_early_is_named():
    statuses, started = run_script("torch_dist", 2, _run_leaves_early)
    assert statuses == [1, 0]
    assert "rank 1 exited after step 0 while other ranks were still waiting for it" in started.output(0)


def test_sum_that_its_last_rank_has_left_is_still_done():
    statuses, started = run_script("torch_dist", 2, _run_leaves_after)
    assert statuses == [0, 0], started.output()


def _run_leaves_after() -> None:
    """Rank 1 gives its part and ends; rank 0 reads the part long after that."""
    backend = init(backend_name(), timeout=timedelta(seconds=60))
    tensor = torch.full((3,), 1.0 + backend.rank)
    handle = backend.sum_buffer(tensor)
    if backend.rank == 1:
        backend.num_pending = 0
        os._exit(0)
    time.sleep(2.0)
    handle.wait()
    assert tensor.eq(3).all()
    os._exit(0)


# Ranks that make other calls than the others, which would add up what does not belong together.


def _run_mismatch(kind: str) -> None:
    backend = init(backend_name(), timeout=timedelta(seconds=60))
    is_other = backend.rank == 1
    if kind == "extra" and is_other:
        backend.all_reduce(torch.ones(3)).wait()
    if kind == "early" and is_other:
        backend.all_gather(torch.ones(3))
    length = {"length": 4, "long": SLOT_BYTES}.get(kind, 3) if is_other else 3
    dtype = torch.float64 if kind == "dtype" and is_other else torch.float32
    try:
        for _ in range(2):
            buffer = torch.ones(length, dtype=dtype)
            backend.sum_buffer(buffer).wait()
            print("sum", buffer.tolist()[:3], flush=True)
    finally:
        os.write(1, b"ended\n")


@pytest.mark.parametrize("kind", ["length", "long", "dtype", "extra", "early"])
def test_ranks_that_make_other_calls_are_an_error_and_no_wrong_sum(kind):
    statuses, started = run_script("torch_dist", 2, _run_mismatch, kind)
    outputs = [started.output(rank) for rank in (0, 1)]
    assert all(statuses) and not any("sum [" in output for output in outputs)
    for output in outputs:  # by what the rank has found itself, or the other one
        assert "the ranks' calls do not match: rank " in output and "does not answer" not in output, outputs


def _run_child_sums() -> None:
    """A forked child that sums is no rank: its numbers are nobody's."""
    backend = current()
    total = torch.ones(3)
    if backend.rank == 1 and (child := os.fork()) == 0:
        shared = backend._shared
        shared.note("all_reduce of the child")
        os._exit(int(shared.takes(total)))
    if backend.rank == 1:
        assert os.waitpid(child, 0)[1] == 0
    backend.sum_buffer(total).wait()
    assert total.eq(2).all()


def test_forked_child_is_no_rank():
    world("torch_dist", 2).run(_run_child_sums)


def _run_without_denormals() -> list[int]:
    """One rank takes denormal numbers for zero, as its user has set, in its own arithmetic alone."""
    backend = current()
    mine = torch.tensor([1e-42, 1.0])
    torch.set_flush_denormal(backend.rank == 0)
    try:
        backend.sum_buffer(mine).wait()
    finally:
        torch.set_flush_denormal(False)
    return mine.view(torch.int32).tolist()


def test_sums_do_not_depend_on_what_a_rank_has_set_for_its_arithmetic():
    expected = (torch.tensor([1e-42, 1.0]) * 2).view(torch.int32).tolist()
    assert world("torch_dist", 2).run(_run_without_denormals) == [expected, expected]


# Worlds that cannot share memory.


def _run_is_shared() -> None:
    backend = init(backend_name(), timeout=timedelta(seconds=60))
    tensor = torch.ones(3)
    backend.sum_buffer(tensor).wait()
    assert tensor.eq(2).all()
    print("shared" if backend._shared is not None else "network", flush=True)


def _run_one_is_told_not_to() -> None:
    if os.environ["RANK"] == "1":
        os.environ[VARIABLE] = "0"
    _run_is_shared()


def _run_one_is_elsewhere() -> None:
    """Rank 1 has a network namespace of its own name: what the ranks of two machines or containers show."""
    from distopt.backends import shared_memory

    if os.environ["RANK"] == "1":
        shared_memory.namespaces = lambda: "elsewhere"
    _run_is_shared()


def _run_one_may_not_map() -> None:
    """Rank 1 finds another file where the memory should be: nothing that it may write to."""
    from distopt.backends import shared_memory

    map_file = shared_memory._map
    with TemporaryFile() as other:
        other.write(bytes(1 << 24))
        other.flush()
        if os.environ["RANK"] == "1":
            path = f"/proc/self/fd/{other.fileno()}"
            shared_memory._map = lambda _, identity, world_size: map_file(path, identity, world_size)
        _run_is_shared()
        other.seek(0)
        assert not any(other.read())


def _run_no_memory() -> None:
    if os.environ["RANK"] == "0":
        del os.memfd_create
    _run_is_shared()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (_run_is_shared, "shared"),
        (_run_one_is_told_not_to, "network"),
        (_run_one_is_elsewhere, "network"),
        (_run_one_may_not_map, "network"),
        (_run_no_memory, "network"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_all_ranks_share_memory_or_none_does(body, expected):
    statuses, started = run_script("torch_dist", 2, body)
    assert statuses == [0, 0], started.output()
    for rank in (0, 1):  # beside what torch says of a store that goes
        assert [line for line in started.output(rank).splitlines() if line in ("shared", "network")] == [expected]


def test_memory_has_no_name_that_could_be_left_behind():
    world("torch_dist", 2).run(_run_is_mapped)


def _run_is_mapped() -> None:
    with open("/proc/self/maps") as maps:
        assert any("/memfd:distopt (deleted)" in line for line in maps)


# The loops in C++ by themselves.


def test_last_call_of_a_rank_is_read_by_others():
    memory = _memory()
    one, other = (_shared_memory.Sums(memory, rank, 2, SLOT_BYTES) for rank in (0, 1))
    assert one.last_call(1) == (0, "")
    other.note(7, "all_reduce of 3")
    assert one.last_call(1) == (7, "all_reduce of 3")
    other.note(8, "x" * 1000)
    number, text = one.last_call(1)
    assert number == 8 and set(text) == {"x"} and len(text) > 100
    with pytest.raises(ValueError, match="no such rank"):
        one.last_call(2)


def test_tensor_without_memory_is_refused():
    with pytest.raises(ValueError, match="has no memory"):
        _shared_memory.Sums(_memory(), 0, 2, SLOT_BYTES).start(0, 4, "torch.float32", 1)


def _memory(world_size: int = 2) -> mmap.mmap:
    return mmap.mmap(-1, _shared_memory.Sums.num_bytes(world_size, SLOT_BYTES))


@pytest.mark.parametrize(
    ("rank", "world_size", "slot_bytes", "message"),
    [(2, 2, SLOT_BYTES, "no such rank"), (-1, 2, SLOT_BYTES, "no such rank"), (0, 1, SLOT_BYTES, "no such rank")]
    + [(0, 2, 100, "no whole lines"), (0, 2, 2 * SLOT_BYTES, "too small"), (0, 3, SLOT_BYTES, "too small")],
)
def test_memory_that_cannot_hold_the_ranks_is_refused(rank, world_size, slot_bytes, message):
    with pytest.raises(ValueError, match=message):
        _shared_memory.Sums(_memory(), rank, world_size, slot_bytes)


def test_other_dtypes_are_refused():
    sums = _shared_memory.Sums(_memory(), 0, 2, SLOT_BYTES)
    with pytest.raises(ValueError, match=r"not of torch\.bool"):
        sums.start(0, 0, "torch.bool", 1)


def test_missing_ranks_are_those_whose_part_is_awaited():
    memory = _memory(3)
    ranks = [_shared_memory.Sums(memory, rank, 3, SLOT_BYTES) for rank in range(3)]
    tensors = [torch.ones(4) for _ in ranks]
    numbers = [None, None, None]
    assert ranks[0].missing() == []
    for rank, left in ((0, [1, 2]), (2, [1])):
        numbers[rank] = ranks[rank].start(tensors[rank].data_ptr(), 16, "torch.float32", 1)
        assert not ranks[rank].wait(numbers[rank], 0.0)
        assert ranks[rank].missing() == left
    numbers[1] = ranks[1].start(tensors[1].data_ptr(), 16, "torch.float32", 1)
    for rank in range(3):
        assert ranks[rank].wait(numbers[rank], 0.0) and ranks[rank].missing() == []
        assert tensors[rank].eq(3).all()


def test_rank_that_has_not_read_keeps_its_slot():
    memory = _memory()
    ranks = [_shared_memory.Sums(memory, rank, 2, SLOT_BYTES) for rank in range(2)]
    tensors = [[torch.full((4,), 10.0 * rank + number) for number in range(4)] for rank in range(2)]

    def start(rank: int, number: int) -> int:
        return ranks[rank].start(tensors[rank][number].data_ptr(), 16, "torch.float32", 1)

    for number in range(4):
        start(0, number)
    assert ranks[0].missing() == [1]
    for number in range(4):
        start(1, number)
    for rank in (0, 1, 0, 1):
        ranks[rank].wait(4, 0.0)
    for of_rank in tensors:
        assert [tensor.tolist() for tensor in of_rank] == [[10.0 + 2 * number] * 4 for number in range(4)]


def test_wait_ends_when_its_time_is_over():
    sums = _shared_memory.Sums(_memory(), 0, 2, SLOT_BYTES)
    number = sums.start(torch.ones(1).data_ptr(), 4, "torch.float32", 1)
    started = time.monotonic()
    assert not sums.wait(number, 0.2)
    assert time.monotonic() - started >= 0.2


def test_rank_that_waits_sleeps():
    pending = SharedMemory(_memory(), 0, [this_process(), this_process()]).start(torch.ones(1))
    thread = threading.Thread(target=pending.poll, args=(3.0,))
    thread.start()
    states = []
    while thread.is_alive():
        with suppress(OSError):
            states.append(Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0])
        time.sleep(0.01)
    assert states.count("S") > len(states) / 2

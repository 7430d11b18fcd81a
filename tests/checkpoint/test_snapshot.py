"""A snapshot is a copy of its own, in memory that is used again, whatever tensors there are."""

from __future__ import annotations

import gc

import pytest
import torch

from distopt.checkpoint import snapshot
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.snapshot import HostMemory, new_block, take_snapshot, without_collection
from distopt.checkpoint.statefile import LARGE_BYTES

LARGE = LARGE_BYTES // 4


def contents(taken):
    return {entry: bytes(block.numpy()) for entry, _, _, block in taken.tensors}


def test_snapshot_holds_what_was_there_when_it_was_taken():
    state = {"large": torch.zeros(LARGE), "small": [torch.zeros(3) for _ in range(9)], "odd": torch.zeros(2, 3).T}
    taken = take_snapshot(state, HostMemory(), "s")
    before = contents(taken)
    for tensor in (state["large"], *state["small"], state["odd"]):
        tensor.fill_(1.0)
    assert contents(taken) == before
    assert all(set(raw) == {0} for raw in before.values())
    assert before.keys() == {"s/large", "packed/F32"}
    assert len(before["packed/F32"]) == (27 + 6) * 4


def test_next_snapshot_of_the_same_name_overwrites_the_memory_and_others_do_not():
    memory, state = HostMemory(), {"x": torch.zeros(LARGE), "y": torch.zeros(2)}
    first = take_snapshot(state, memory, "a")
    other = take_snapshot(state, memory, "b")
    pointers = [block.data_ptr() for *_, block in first.tensors]
    assert not {*pointers} & {block.data_ptr() for *_, block in other.tensors}
    state["x"].fill_(2.0)
    again = take_snapshot(state, memory, "a")
    assert [block.data_ptr() for *_, block in again.tensors] == pointers
    assert contents(first) == contents(again) != contents(other)


def test_memory_that_was_not_taken_since_the_last_trim_is_freed():
    memory = HostMemory()
    kept, gone = memory.take("kept", 10), memory.take("gone", 10)
    memory.trim()
    assert memory.take("kept", 10) is kept
    memory.trim()
    assert memory.take("kept", 10) is kept
    assert memory.take("gone", 10) is not gone
    assert len(memory.take("kept", 20)) == 20


def test_several_threads_copy_what_is_large_enough_to_pay_for_them(monkeypatch):
    monkeypatch.setattr(snapshot, "_COPIED_ALONE_BYTES", LARGE_BYTES)
    state = [torch.full((LARGE,), float(number)) for number in range(5)]
    taken = take_snapshot(state, HostMemory(), "s")
    assert [block.view(torch.float32)[0].item() for *_, block in taken.tensors] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_keys_that_spell_the_same_path_keep_tensors_apart():
    state = {"a/b": torch.zeros(LARGE), "a": {"b": torch.ones(LARGE)}}
    taken = take_snapshot(state, HostMemory(), "s")
    assert [entry for entry, *_ in taken.tensors] == ["s/a/b", "s/a/b#2"]
    assert taken.tree == {
        "a/b": {"$t": f"float32 {LARGE}", "in": "s/a/b"},
        "a": {"b": {"$t": f"float32 {LARGE}", "in": "s/a/b#2"}},
    }


def test_widest_dtypes_come_first_so_that_every_tensor_is_aligned_in_the_file():
    state = [torch.zeros(3, dtype=dtype) for dtype in (torch.uint8, torch.float64, torch.float16, torch.float32)]
    taken = take_snapshot(state, HostMemory(), "s")
    assert [dtype for _, dtype, _, _ in taken.tensors] == ["F64", "F32", "F16", "U8"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["sparse", "meta"],
)
def test_tensor_that_no_file_can_hold_is_refused_with_its_path(tensor):
    with pytest.raises(CheckpointError, match="s/x/0: a tensor of .* cannot be saved"):
        take_snapshot({"x": [tensor]}, HostMemory(), "s")


def test_text_beyond_what_is_read_is_not_written(monkeypatch):
    monkeypatch.setattr(snapshot, "MAX_JSON_BYTES", 100)
    take_snapshot(["x" * 90], HostMemory(), "s").files("s", {})
    with pytest.raises(CheckpointError, match="s: 104 bytes of names and numbers, at most 100 are kept"):
        take_snapshot(["x" * 100], HostMemory(), "s").files("s", {})


def test_garbage_collection_is_off_inside_and_as_before_outside():
    with without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 12345])
def test_new_block_has_the_size_that_was_asked_for(size):
    block = new_block(size)
    block.fill_(7)
    assert (block.dtype, len(block)) == (torch.uint8, size)

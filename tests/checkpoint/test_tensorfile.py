"""The header of a safetensors file: what the safetensors library writes is read, and the other way round."""

from __future__ import annotations

import json
import random

import pytest
import safetensors.torch
import torch

from distopt.checkpoint import tensorfile
from distopt.checkpoint.tensorfile import ITEM_BYTES, Entry, decode_header, encode_header, header_bytes

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "flat": torch.arange(5, dtype=torch.float32),
    "half": torch.ones(4, dtype=torch.float16),
    "empty": torch.zeros(0, 3, dtype=torch.int32),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
}


def test_header_of_the_safetensors_library_is_read():
    raw = safetensors.torch.save(TENSORS, {"step": "3"})
    size = header_bytes(raw[:8], len(raw))
    entries, metadata = decode_header(raw[:size], len(raw))
    assert metadata == {"step": "3"}
    assert {name: entry.shape for name, entry in entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert entry.size_bytes == tensor.numel() * tensor.element_size()
        assert raw[entry.start : entry.start + entry.size_bytes] == tensor.numpy().tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_header_that_is_written_is_read_by_the_safetensors_library_and_by_itself(seed):
    chance = random.Random(seed)
    tensors = [
        (f"n{index} \u2603", chance.choice(["F64", "F32", "I16", "U8"]), [chance.randint(0, 4)] * chance.randint(0, 3))
        for index in range(chance.randint(0, 20))
    ]
    tensors.sort(key=lambda tensor: -ITEM_BYTES[tensor[1]])
    header = encode_header(tensors, {"attempt": "a"})
    data = chance.randbytes(sum(Entry(name, dtype, tuple(shape), 0).size_bytes for name, dtype, shape in tensors))
    assert len(header) % 8 == 0

    loaded = safetensors.torch.load(header + data)
    assert {name: list(tensor.shape) for name, tensor in loaded.items()} == {name: shape for name, _, shape in tensors}
    entries, metadata = decode_header(header, len(header + data))
    assert metadata == {"attempt": "a"}
    assert [(entry.name, entry.dtype, [*entry.shape]) for entry in entries.values()] == tensors
    for entry in entries.values():
        assert entry.start % ITEM_BYTES[entry.dtype] == 0


def test_header_of_more_tensors_than_are_read_is_not_written(monkeypatch):
    monkeypatch.setattr(tensorfile, "MAX_ENTRIES", 3)
    encode_header([(str(index), "U8", []) for index in range(3)], {})
    with pytest.raises(ValueError, match="4 tensors of 64 KiB and more; one file holds 3"):
        encode_header([(str(index), "U8", []) for index in range(4)], {})


@pytest.mark.parametrize("first", [b"", b"\x02", (1 << 40).to_bytes(8, "little"), (11).to_bytes(8, "little")])
def test_length_that_cannot_be_the_headers_is_refused(first):
    with pytest.raises(ValueError, match="a header of"):
        header_bytes(first, 18 if len(first) == 8 else len(first))


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": 3, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]},
        None,
    ],
    ids=str,
)
def test_tensor_that_is_described_otherwise_is_refused(value):
    text = json.dumps({"x": value}).encode()
    raw = len(text).to_bytes(8, "little") + text
    with pytest.raises(ValueError, match="tensor 'x'"):
        decode_header(raw, len(raw) + 4)


@pytest.mark.parametrize("metadata", [[1], {"step": 1}])
def test_metadata_that_are_no_strings_are_refused(metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    raw = len(text).to_bytes(8, "little") + text
    with pytest.raises(ValueError, match="metadata that are not strings"):
        decode_header(raw, len(raw))

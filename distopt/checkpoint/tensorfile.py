"""The layout of a safetensors file: a JSON header, then the tensors' bytes without a gap.

Written and read here byte by byte, so that tensors go straight from and to their memory while they are hashed, and a
few rows can be read alone. The files are what the safetensors library reads.

References:
    https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 16 << 20
MAX_ENTRIES = 100_000
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Entry:
    """Where in the file one tensor is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


def encode_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Returns the first bytes of the file; the data of all tensors follow in this order.

    Args:
        tensors: (name, dtype, shape) of each, the widest dtype first: then each begins at a multiple of its item's
            size.
        metadata: What else the header says.

    Raises:
        ValueError: There are more of them than `decode_header` reads.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end

    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or len(tensors) > MAX_ENTRIES:
        raise ValueError(f"{len(tensors):,} tensors of 64 KiB and more; one file holds {MAX_ENTRIES:,}")
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def header_bytes(first: bytes, size: int) -> int:
    """Returns the header's size with these bytes, read from the first eight bytes of a file of `size` bytes.

    Raises:
        ValueError: It cannot be that.
    """
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if size < _LENGTH_BYTES + 2 or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length:,} bytes in a file of {size:,} (at most {MAX_HEADER_BYTES:,} are read)")
    return _LENGTH_BYTES + length


def decode_header(raw: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the tensors by name and the metadata; `raw` is the whole header, `size` the file's.

    Raises:
        ValueError: There are overlapping, missing or surplus bytes, unknown dtypes, repeated names, or anything else
            that is no well-formed header.
    """
    # Counted before the text is parsed, which needs many times its size: an entry has four colons, beside those
    # in its name.
    if raw.count(b":") > 8 * MAX_ENTRIES:
        raise ValueError(f"more than {MAX_ENTRIES:,} tensors, which is more than is read")
    try:
        document = json.loads(raw[_LENGTH_BYTES:], object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("a header nested too deep") from error

    if not isinstance(document, dict):
        raise ValueError("a header that is no object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that are not strings")
    if len(document) > MAX_ENTRIES:
        raise ValueError(f"{len(document):,} tensors, at most {MAX_ENTRIES:,} are read")

    # Each tensor must begin where the one before it ends: then no byte belongs to two tensors, or to none.
    entries: dict[str, Entry] = {}
    offset = len(raw)
    for name, value in document.items():
        entries[name] = entry = _entry(name, value, offset, len(raw))
        offset += entry.size_bytes
    if offset != size:
        raise ValueError(f"tensors that end at byte {offset:,} of {size:,}")
    return entries, metadata


def _entry(name: str, value: Any, start: int, base: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(length) is int and 0 <= length < 1 << 62 for length in shape):
        raise ValueError(f"tensor {name!r} has the shape {shape!r}")
    entry = Entry(name, dtype, tuple(shape), start)
    if offsets != [start - base, start - base + entry.size_bytes]:
        raise ValueError(f"tensor {name!r} lies at {offsets}, it should follow its neighbour without gap or overlap")
    return entry


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name that comes twice")
    return mapping

"""Nested state in two files: `NAME.json.gz` for its shape and numbers, `NAME.safetensors` for its tensors.

A tensor of 64 KiB or more has an entry named by its path, and goes to the disk straight from its copy. Smaller ones are
packed into one entry per dtype, in the order of the JSON, so that a thousand of them cost a few bytes each and not a
hundred. Nothing says where in its pack a tensor is: readers walk over the JSON and count. So JSON and tensors must fit
together to the last byte, and every one of these bytes is checked (`CheckedFile`) before it becomes part of a tensor.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from distopt.checkpoint.chunks import thread_pool
from distopt.checkpoint.codec import Json, TensorNote, decode
from distopt.checkpoint.errors import CorruptCheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.reader import CheckedFile
from distopt.checkpoint.storage.base import Storage
from distopt.checkpoint.tensorfile import Entry

LARGE_BYTES = 64 << 10
"""Tensors of at least this size have their own entry."""
MAX_JSON_BYTES = 64 << 20
"""More text than this is not read, however little it was compressed to."""
_CLONED_BYTES = 1 << 20  # larger than any parameter that optimizers pack

STORED: dict[torch.dtype, tuple[str, torch.dtype]] = {
    torch.bool: ("BOOL", torch.bool), torch.uint8: ("U8", torch.uint8), torch.int8: ("I8", torch.int8),
    torch.int16: ("I16", torch.int16), torch.int32: ("I32", torch.int32), torch.int64: ("I64", torch.int64),
    torch.uint16: ("U16", torch.int16), torch.uint32: ("U32", torch.int32), torch.uint64: ("U64", torch.int64),
    torch.float16: ("F16", torch.float16), torch.bfloat16: ("BF16", torch.bfloat16),
    torch.float32: ("F32", torch.float32), torch.float64: ("F64", torch.float64),
    torch.complex64: ("F32", torch.float32), torch.complex128: ("F64", torch.float64),
    torch.float8_e4m3fn: ("F8_E4M3", torch.int8), torch.float8_e5m2: ("F8_E5M2", torch.int8),
}  # fmt: skip
"""dtype → its name in safetensors, and a dtype of the same size whose elements can be copied and concatenated."""


def reinterpret(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a view of the same bytes."""
    viewed: Tensor = tensor.view(dtype)
    return viewed


def bytes_of(block: Tensor) -> memoryview:
    """Returns the memory of a (bytes,) uint8 tensor of the host."""
    return memoryview(cast(Any, block.numpy()))


class StateReader:
    """Reads what `Snapshot.files` wrote; every byte that it returns has been checked.

    Args:
        storage: Where the checkpoint is.
        folder: Its folder.
        manifest: Its manifest.
        name: Of the state, without suffix.

    Raises:
        CorruptCheckpointError: The JSON or the header of the tensors is not what was written.
    """

    def __init__(self, storage: Storage, folder: str, manifest: Manifest, name: str) -> None:
        self.manifest = manifest
        self._storage = storage
        self._folder = folder
        self._shared: CheckedFile | None = None
        self._where = f"{storage.root}/{folder}/{name}"
        self._file = f"{name}.safetensors"
        if f"{name}.json.gz" not in manifest.files:
            raise CorruptCheckpointError(f"{self._where}.json.gz is not in the manifest.")
        with self._open(f"{name}.json.gz") as file:
            self.tree = _parse(file.read(0, file.size), f"{self._where}.json.gz")
        self._entries: dict[str, Entry] = {}
        if self._file in manifest.files:
            self._entries, _ = self.shared_file().header()

    def _open(self, file: str) -> CheckedFile:
        return CheckedFile(self._storage, self._folder, file, self.manifest.files[file], self.manifest)

    def load(self, accelerator: torch.device | None = None) -> Any:
        """Returns all of the state.

        Args:
            accelerator: Where tensors go that came from an accelerator; all others, or all if it is None, are on the
                CPU.

        Raises:
            CorruptCheckpointError: A byte differs from what was written, or JSON and tensors do not fit together.
        """
        # The entries follow each other in the file without a gap, so one pass over it fills all blocks.
        blocks = {name: torch.empty(entry.size_bytes, dtype=torch.uint8) for name, entry in self._entries.items()}
        if blocks:
            first = min(entry.start for entry in self._entries.values())
            with thread_pool() as pool:
                self.shared_file().read_into(first, [bytes_of(block) for block in blocks.values()], pool)
            self.close()

        used = dict.fromkeys(self._entries, 0)

        def get(note: Json) -> Tensor:
            wanted = TensorNote.from_json(note)
            entry, start, stop = self._span(wanted, used)
            tensor = as_dtype(blocks[entry][start:stop], wanted)
            if wanted.on_accelerator and accelerator is not None:
                return tensor.to(accelerator)
            # Without the clone one small tensor would keep its whole pack alive, and optimizers could not pack what is
            # in memory that NumPy has a view of.
            return tensor.clone() if wanted.entry is None or stop - start <= _CLONED_BYTES else tensor

        state = decode(self.tree, get)
        self._check_all_used(used)
        return state

    def shared_file(self) -> CheckedFile:
        """Returns the tensors' file, opened once: the chunk read last serves its neighbours."""
        if self._shared is None:
            self._shared = self._open(self._file)
        return self._shared

    def close(self) -> None:
        """Releases the tensors' file, which `load` does by itself."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def visit(self, read: Callable[[TensorNote, RowReader], Any]) -> Any:
        """Returns the state with `read(note, rows)` in place of each tensor, to read some rows of some of them.

        Args:
            read: What to make of each tensor; `rows` can be kept and read from later. Call `close` afterwards.
        """
        used = dict.fromkeys(self._entries, 0)

        def get(note: Json) -> Tensor:
            wanted = TensorNote.from_json(note)
            entry, start, _ = self._span(wanted, used)
            replacement: Tensor = read(wanted, RowReader(self, wanted, self._entries[entry].start + start))
            return replacement

        return decode(self.tree, get)

    def _span(self, wanted: TensorNote, used: dict[str, int]) -> tuple[str, int, int]:
        """Returns where a tensor is: name of the entry, first byte in it, and the byte behind the last.

        Args:
            wanted: The tensor.
            used: By entry, how many of its bytes belong to the tensors before.
        """
        stored, _ = STORED[wanted.dtype]
        name = wanted.entry or f"packed/{stored}"
        size = math.prod(wanted.shape) * wanted.dtype.itemsize
        entry = self._entries.get(name)
        if entry is None or entry.dtype != stored or used[name] + size > entry.size_bytes:
            raise CorruptCheckpointError(f"{self._where}: entry {name!r} does not hold the {wanted.as_json()['$t']}.")
        start = used[name]
        used[name] += size
        return name, start, start + size

    def _check_all_used(self, used: Mapping[str, int]) -> None:
        for name, entry in self._entries.items():
            if used[name] != entry.size_bytes:
                raise CorruptCheckpointError(f"{self._where}: entry {name!r} holds more than the JSON says.")


class RowReader:
    """One tensor of a state file, of which some rows may be read alone.

    Args:
        state: The file, which must be open while rows are read.
        note: The tensor's dtype and shape.
        offset: Of its first byte in the file.
    """

    def __init__(self, state: StateReader, note: TensorNote, offset: int) -> None:
        self._state = state
        self._note = note
        self._offset = offset

    def read(self, start: int, stop: int) -> Tensor:
        """Returns rows `start` to `stop` of the first dimension, shape (stop - start, ...)."""
        shape = (stop - start, *self._note.shape[1:])
        row_bytes = math.prod(self._note.shape[1:]) * self._note.dtype.itemsize
        block = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        with thread_pool() as pool:
            self._state.shared_file().read_into(self._offset + start * row_bytes, [bytes_of(block)], pool)
        return as_dtype(block, TensorNote(self._note.dtype, shape))


def as_dtype(block: Tensor, wanted: TensorNote) -> Tensor:
    """Returns bytes as the tensor that a note describes, without a copy where they are aligned."""
    if block.numel() == 0:
        return torch.empty(wanted.shape, dtype=wanted.dtype)
    if block.storage_offset() % wanted.dtype.itemsize:
        block = block.clone()
    return reinterpret(block, wanted.dtype).view(wanted.shape)


def _parse(raw: bytes, where: str) -> Json:
    """Returns the JSON in a gzip file, of which no more than `MAX_JSON_BYTES` are unpacked."""
    try:
        unpacker = zlib.decompressobj(wbits=31)
        text = unpacker.decompress(raw, MAX_JSON_BYTES)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"not one gzip stream of at most {MAX_JSON_BYTES:,} bytes")
        return json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{where}: {error}.") from error

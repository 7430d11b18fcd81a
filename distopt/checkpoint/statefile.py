"""Nested state in two files: `NAME.json.gz` for its shape and numbers, `NAME.safetensors` for its tensors.

A tensor of 64 KiB or more has an entry of its own, named by its path, and goes to the disk straight from its copy.
Smaller ones lie packed in one entry per dtype, in the order of the JSON, so that a thousand of them cost a few bytes
each and not a hundred.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from distopt.checkpoint.codec import Json, Place, TensorNote, decode, encode, path_of
from distopt.checkpoint.errors import CheckpointError, CorruptCheckpointError
from distopt.checkpoint.manifest import Manifest
from distopt.checkpoint.memory import HostMemory
from distopt.checkpoint.reader import CheckedFile
from distopt.checkpoint.storage import Storage
from distopt.checkpoint.tensorfile import Entry, encode_header
from distopt.checkpoint.writer import thread_pool

OWN_ENTRY_BYTES = 64 << 10
MAX_JSON_BYTES = 64 << 20
_CLONED_BYTES = 1 << 20  # beyond what optimizers pack
_COPIED_ALONE_BYTES = 16 << 20  # up to here starting threads takes longer than the copy
_COMPRESSION = 1  # level 9 takes ten times as long for a tenth less

_STORED: dict[torch.dtype, tuple[str, torch.dtype]] = {
    torch.bool: ("BOOL", torch.bool), torch.uint8: ("U8", torch.uint8), torch.int8: ("I8", torch.int8),
    torch.int16: ("I16", torch.int16), torch.int32: ("I32", torch.int32), torch.int64: ("I64", torch.int64),
    torch.uint16: ("U16", torch.int16), torch.uint32: ("U32", torch.int32), torch.uint64: ("U64", torch.int64),
    torch.float16: ("F16", torch.float16), torch.bfloat16: ("BF16", torch.bfloat16),
    torch.float32: ("F32", torch.float32), torch.float64: ("F64", torch.float64),
    torch.complex64: ("F32", torch.float32), torch.complex128: ("F64", torch.float64),
    torch.float8_e4m3fn: ("F8_E4M3", torch.int8), torch.float8_e5m2: ("F8_E5M2", torch.int8),
}  # fmt: skip
"""dtype → its name in safetensors, and a dtype of the same size whose elements can be copied and concatenated."""


_Copied: TypeAlias = tuple[str, str, tuple[int, ...], Tensor]
"""(entry, safetensors dtype, shape, (bytes,) uint8 on the host)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of nested state in memory that nobody else writes to."""

    tree: Json
    tensors: tuple[_Copied, ...]
    """The widest dtype first."""

    def files(self, name: str, metadata: Mapping[str, str]) -> dict[str, list[memoryview]]:
        """Returns the bytes of its files by file name; no tensor is copied again."""
        text = json.dumps(self.tree, separators=(",", ":"), allow_nan=False).encode()
        if len(text) > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{name}: {len(text):,} bytes of names and numbers, at most {MAX_JSON_BYTES:,} are kept."
            )
        files = {f"{name}.json.gz": [memoryview(gzip.compress(text, _COMPRESSION, mtime=0))]}
        if self.tensors:
            header = encode_header([(entry, dtype, shape) for entry, dtype, shape, _ in self.tensors], metadata)
            files[f"{name}.safetensors"] = [memoryview(header), *self.blocks()]
        return files

    def blocks(self) -> list[memoryview]:
        """Returns the bytes of its tensors, in their order."""
        return [_bytes_of(block) for *_, block in self.tensors]


def take_snapshot(state: Any, memory: HostMemory, name: str, accelerator: torch.device | None = None) -> Snapshot:
    """Returns a copy of `state`; once it returns, changes of the tensors no longer reach it.

    Args:
        state: nested dicts, lists and tuples of tensors (any device) and plain values, see `codec.encode`.
        memory: where the copies lie; the next snapshot of the same name overwrites them.
        name: tells the snapshots of one save apart.
        accelerator: tensors that lie there are marked, and loaded to the accelerator of the run that loads them.

    Raises:
        CheckpointError: for a value that has no description, naming its place.

    Cost: one copy of the tensors, by several threads when there is much of it; small ones are gathered on their
    device first.
    """
    gathering = _Gathering(accelerator)
    with torch.no_grad():
        tree = encode(state, gathering.put, (None, name))
        tensors = _copy_own(gathering.own, memory, name)
        tensors += [_copy_pack(pack, memory, name) for pack in gathering.packs.values() if pack.members]
    if accelerator is not None:
        torch.accelerator.synchronize(accelerator)
    tensors.sort(key=lambda tensor: (-_width(tensor[1]), tensor[0]))
    return Snapshot(tree, tuple(tensors))


@dataclass
class _Pack:
    """The small tensors of one stored dtype."""

    stored: str
    members: list[Tensor] = field(default_factory=list)


@dataclass
class _Kind:
    """What all tensors of one dtype, layout and device have in common."""

    stored: str
    pack: _Pack
    on_accelerator: bool
    item_bytes: int
    is_plain: bool
    """Stored as it is, so that it need not be looked at one by one."""
    notes: dict[torch.Size, Json] = field(default_factory=dict)


class _Gathering:
    """Sorts the tensors that the state holds into large ones and packs."""

    def __init__(self, accelerator: torch.device | None) -> None:
        self.own: dict[str, tuple[str, Tensor]] = {}
        self.packs: dict[str, _Pack] = {}
        self._accelerator = accelerator
        self._kinds: dict[tuple[torch.dtype, torch.layout, torch.device], _Kind] = {}

    def put(self, tensor: Tensor, where: Place) -> Json:
        kind = self._kinds.get((tensor.dtype, tensor.layout, tensor.device)) or self._new_kind(tensor, where)
        if tensor.numel() * kind.item_bytes >= OWN_ENTRY_BYTES:
            entry = _unused(path_of(where), self.own)
            self.own[entry] = (kind.stored, tensor)
            return TensorNote(tensor.dtype, tuple(tensor.shape), entry, kind.on_accelerator).as_json()
        kind.pack.members.append(tensor if kind.is_plain else _as_stored(tensor))
        shape = tensor.shape
        note = kind.notes.get(shape)
        if note is None:
            note = kind.notes[shape] = TensorNote(tensor.dtype, tuple(shape), None, kind.on_accelerator).as_json()
        return note

    def _new_kind(self, tensor: Tensor, where: Place) -> _Kind:
        if tensor.dtype not in _STORED or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path_of(where)}: a tensor of {tensor.dtype} and layout {tensor.layout} on {tensor.device} cannot be "
                "saved."
            )
        stored, plain = _STORED[tensor.dtype]
        pack = self.packs.setdefault(stored, _Pack(stored))
        kind = _Kind(
            stored,
            pack,
            tensor.device == self._accelerator,
            tensor.dtype.itemsize,
            tensor.dtype == plain,
        )
        self._kinds[tensor.dtype, tensor.layout, tensor.device] = kind
        return kind


def _as_stored(tensor: Tensor) -> Tensor:
    """Returns the elements in one row, of a dtype that every operation knows."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.reshape(-1) if not tensor.is_neg() else tensor.resolve_neg().reshape(-1)
    plain = _STORED[tensor.dtype][1]
    return flat if flat.dtype == plain else _reinterpret(flat, plain)


def _reinterpret(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    viewed: Tensor = tensor.view(dtype)
    return viewed


def _copy_own(own: Mapping[str, tuple[str, Tensor]], memory: HostMemory, name: str) -> list[_Copied]:
    """Copies tensors that have entries of their own, each whole: that is when memcpy goes around the caches."""
    copied, on_host = [], []
    for entry, (stored, tensor) in own.items():
        shape = tuple(tensor.shape) + ((2,) if tensor.is_complex() else ())
        plain = _STORED[tensor.dtype][1]
        block = memory.take(f"{name}:{entry}", math.prod(shape) * plain.itemsize)
        copied.append((entry, stored, shape, block))
        if not tensor.is_contiguous() and not tensor.is_complex() and tensor.dtype == plain:
            # In the order of the memory, without a temporary copy.
            _reinterpret(block, plain).view(shape).copy_(tensor, non_blocking=True)
        elif tensor.device.type == "cpu":
            on_host.append((block.numpy(), _reinterpret(_as_stored(tensor), torch.uint8).numpy()))
        else:
            _reinterpret(block, plain).copy_(_as_stored(tensor), non_blocking=True)
    if sum(len(target) for target, _ in on_host) > _COPIED_ALONE_BYTES:
        with thread_pool() as pool:
            list(pool.map(lambda pair: np.copyto(*pair), on_host))
    else:
        for pair in on_host:
            np.copyto(*pair)
    return copied


def _copy_pack(pack: _Pack, memory: HostMemory, name: str) -> _Copied:
    """Gathers the small tensors of one dtype: on their device first, so that one transfer moves all of them."""
    flats = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in pack.members]
    for device in {tensor.device for tensor in flats} - {torch.device("cpu")}:
        places = [index for index, tensor in enumerate(flats) if tensor.device == device]
        gathered = torch.cat([flats[index] for index in places]).cpu()
        for index, piece in zip(places, torch.split(gathered, [flats[index].numel() for index in places]), strict=True):
            flats[index] = piece
    count = sum(flat.numel() for flat in flats)
    entry = f"packed/{pack.stored}"
    dtype = next(plain for stored, plain in _STORED.values() if stored == pack.stored)
    block = memory.take(f"{name}:{entry}", count * dtype.itemsize)
    torch.cat(flats, out=_reinterpret(block, dtype))  # one call, since a thousand take longer than the copying
    return entry, pack.stored, (count,), block


def _width(stored: str) -> int:
    return next(plain.itemsize for name, plain in _STORED.values() if name == stored)


def _unused(entry: str, taken: Mapping[str, object]) -> str:
    name, count = entry, 2
    while name in taken:
        name, count = f"{entry}#{count}", count + 1
    return name


def _bytes_of(block: Tensor) -> memoryview:
    return memoryview(cast(Any, block.numpy()))


class StateReader:
    """Reads what `Snapshot.files` wrote; every byte that it returns has been checked."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest, name: str) -> None:
        self._place = (storage, folder, manifest)
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
        storage, folder, manifest = self._place
        return CheckedFile(storage, folder, file, manifest.files[file], manifest)

    def load(self, accelerator: torch.device | None = None) -> Any:
        """Returns all of the state, tensors on the CPU or on `accelerator` when they came from one.

        Raises:
            CorruptCheckpointError: when a byte differs from what was written, or JSON and tensors do not fit together.
        """
        blocks = {entry: torch.empty(found.size_bytes, dtype=torch.uint8) for entry, found in self._entries.items()}
        if blocks:
            first = min(found.start for found in self._entries.values())
            with thread_pool() as pool:
                self.shared_file().read_into(first, [_bytes_of(block) for block in blocks.values()], pool)
            self.close()
        used = dict.fromkeys(self._entries, 0)

        def get(note: Json) -> Tensor:
            wanted = TensorNote.from_json(note)
            entry, start, stop = self._span(wanted, used)
            tensor = _as_dtype(blocks[entry][start:stop], wanted)
            if wanted.on_accelerator and accelerator is not None:
                return tensor.to(accelerator)
            # Else one small tensor would keep its whole pack alive, and no optimizer could move what lies in memory
            # that numpy has seen.
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
        """Lets go of the tensors' file, which `load` does by itself."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def visit(self, read: Callable[[TensorNote, RowReader], Any]) -> Any:
        """Returns the state with `read(note, rows)` in the place of each tensor: to read some rows of some of them.

        Call `close` when no more rows are read.
        """
        used = dict.fromkeys(self._entries, 0)

        def get(note: Json) -> Tensor:
            wanted = TensorNote.from_json(note)
            entry, start, _ = self._span(wanted, used)
            found: Tensor = read(wanted, RowReader(self, wanted, self._entries[entry].start + start))
            return found

        return decode(self.tree, get)

    def _span(self, wanted: TensorNote, used: dict[str, int]) -> tuple[str, int, int]:
        """Returns where a tensor lies: entry, first and last byte in it."""
        stored, plain = _STORED[wanted.dtype]
        entry = wanted.entry or f"packed/{stored}"
        size = math.prod(wanted.shape) * wanted.dtype.itemsize
        found = self._entries.get(entry)
        if found is None or found.dtype != stored or used[entry] + size > found.size_bytes:
            raise CorruptCheckpointError(f"{self._where}: entry {entry!r} does not hold the {wanted.as_json()['$t']}.")
        start = used[entry]
        used[entry] += size
        return entry, start, start + size

    def _check_all_used(self, used: Mapping[str, int]) -> None:
        for entry, found in self._entries.items():
            if used[entry] != found.size_bytes:
                raise CorruptCheckpointError(f"{self._where}: entry {entry!r} holds more than the JSON says.")


class RowReader:
    """One tensor of a state file, of which some rows may be read alone."""

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
            self._state.shared_file().read_into(self._offset + start * row_bytes, [_bytes_of(block)], pool)
        return _as_dtype(block, TensorNote(self._note.dtype, shape))


def _as_dtype(block: Tensor, wanted: TensorNote) -> Tensor:
    if block.numel() == 0:
        return torch.empty(wanted.shape, dtype=wanted.dtype)
    if block.storage_offset() % wanted.dtype.itemsize:
        block = block.clone()
    return _reinterpret(block, wanted.dtype).view(wanted.shape)


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

"""A copy of the state of a run in memory, taken between two steps and written while training continues.

Training stands still while the copy is made, so it is made as fast as memory is: into memory of the save before, by
several threads where there is much of it, and with few calls where there are many small tensors. Everything else (JSON,
compression, hashing, writing) happens afterwards, in another thread.
"""

from __future__ import annotations

import ctypes
import gc
import gzip
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from distopt.checkpoint.chunks import thread_pool
from distopt.checkpoint.codec import Json, Location, TensorNote, decode, encode, path_of
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.statefile import (
    LARGE_BYTES,
    MAX_JSON_BYTES,
    STORED,
    as_dtype,
    bytes_of,
    reinterpret,
)
from distopt.checkpoint.tensorfile import encode_header
from distopt.nonfinite import is_finite

_HUGE_BYTES = 4 << 20
_COPIED_ALONE_BYTES = 16 << 20  # up to here starting threads takes longer than the copy
_COMPRESSION = 1  # level 9 takes ten times as long for a tenth less
_libc = ctypes.CDLL(None)

_Copied: TypeAlias = tuple[str, str, tuple[int, ...], Tensor]
"""(entry, safetensors dtype, shape, (bytes,) uint8 on the host)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of nested state in memory that nothing else writes to."""

    tree: Json
    """The state, with a note in place of each tensor."""
    tensors: tuple[_Copied, ...]
    """The widest dtype first."""

    def files(self, name: str, metadata: Mapping[str, str]) -> dict[str, list[memoryview]]:
        """Returns the bytes of its files by file name; no tensor is copied again.

        Args:
            name: Of the state, without suffix.
            metadata: For the header of the safetensors file.

        Raises:
            CheckpointError: There is more text than is read.
        """
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

    def is_finite(self) -> bool:
        """Returns whether all of its numbers are; False also for what may hold others on purpose."""
        plain = {stored: dtype for stored, dtype in STORED.values() if dtype.is_floating_point}
        return all(
            is_finite(reinterpret(block, plain[stored])) for _, stored, _, block in self.tensors if stored in plain
        )

    def decoded(self) -> Any:
        """Returns the state; its tensors are views of the copy."""
        blocks = {entry: block for entry, _, _, block in self.tensors}
        used = dict.fromkeys(blocks, 0)

        def get(note: Json) -> Tensor:
            wanted = TensorNote.from_json(note)
            entry = wanted.entry or f"packed/{STORED[wanted.dtype][0]}"
            start = used[entry]
            used[entry] += math.prod(wanted.shape) * wanted.dtype.itemsize
            return as_dtype(blocks[entry][start : used[entry]], wanted)

        return decode(self.tree, get)

    def blocks(self) -> list[memoryview]:
        """Returns the bytes of its tensors, in their order."""
        return [bytes_of(block) for *_, block in self.tensors]


def take_snapshot(state: Any, memory: HostMemory, name: str, accelerator: torch.device | None = None) -> Snapshot:
    """Returns a copy of `state`; once it returns, changes of the tensors no longer reach it.

    Args:
        state: Nested dicts, lists and tuples of tensors (any device) and plain values, see `codec.encode`.
        memory: Holds the copies; the next snapshot of the same name overwrites them.
        name: Tells the snapshots of one save apart.
        accelerator: Tensors on it are marked, and loaded to the accelerator of the run that loads them.

    Raises:
        CheckpointError: A value has no description; the message has its path.

    Cost:
        One copy of the tensors, by several threads when there is much of it; small ones are gathered on their device
        first.
    """
    collected = _Collected(accelerator)
    with torch.no_grad():
        tree = encode(state, collected, (None, name))
        tensors = _copy_large(collected.large, memory, name)
        tensors += [_copy_pack(pack, memory, name) for pack in collected.packs.values() if pack.segments]

    # Copies from the accelerator were only started so far: all of them are in flight at once.
    if accelerator is not None:
        torch.accelerator.synchronize(accelerator)
    tensors.sort(key=lambda tensor: (-_width(tensor[1]), tensor[0]))
    return Snapshot(tree, tuple(tensors))


# Memory of the host that tensors are copied to, kept from one save to the next.


@contextmanager
def without_collection() -> Iterator[None]:
    """Runs the body without garbage collections.

    Describing a state makes thousands of containers, and none of them is garbage. Their number would start a full
    collection now and then, which with torch loaded takes a tenth of a second.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class HostMemory:
    """Blocks by name: a save takes those of the save before, whose pages the kernel has already provided.

    Args:
        pinned: Whether the memory is page-locked, so that a GPU copies to it directly.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._blocks: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def take(self, name: str, size: int) -> Tensor:
        """Returns (size,) uint8; the block that was taken under that name before is overwritten by it."""
        block = self._blocks.get(name)
        if block is None or len(block) != size:
            self._blocks.pop(name, None)
            block = self._blocks[name] = new_block(size, pinned=self._pinned)
        self._used.add(name)
        return block

    def trim(self) -> None:
        """Frees the blocks that were not taken since the last call: of parameters that are gone."""
        for name in self._blocks.keys() - self._used:
            del self._blocks[name]
        self._used.clear()


def new_block(size: int, *, pinned: bool = False) -> Tensor:
    """Returns (size,) uint8, not filled.

    It asks for huge pages: the first touch of 1 GiB then costs 512 page faults and not 262,144.

    Args:
        size: Bytes.
        pinned: Whether the memory is page-locked.
    """
    block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    if size >= _HUGE_BYTES and not pinned and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (block.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Only a hint: a kernel without huge pages answers with an error and provides ordinary ones.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return block


# Sorting: which tensors are copied each by itself, and which together.
#
# A tensor of `LARGE_BYTES` or more has its own entry in the file. Smaller ones of one dtype form a pack, one entry for
# all of them, in the order in which `encode` finds them. Reading splits a pack by walking over the JSON in the same
# order, so the order is all that has to be kept.


@dataclass
class _Segment:
    """Small tensors that follow each other in a pack and are copied by one call."""

    uniform: bool
    """Whether all are of one shape and on one device."""
    tensors: list[Tensor]

    def numel(self) -> int:
        """Returns the number of elements of all."""
        if self.uniform:
            return self.tensors[0].numel() * len(self.tensors)
        return sum(tensor.numel() for tensor in self.tensors)


@dataclass
class _Pack:
    """The small tensors of one stored dtype, in the order of the JSON."""

    stored: str
    segments: list[_Segment] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        """Appends one tensor of any shape."""
        if not self.segments or self.segments[-1].uniform:
            self.segments.append(_Segment(False, []))
        self.segments[-1].tensors.append(tensor)


@dataclass
class _Kind:
    """What all tensors of one dtype, layout and device have in common."""

    stored: str
    pack: _Pack
    on_accelerator: bool
    item_bytes: int
    is_plain: bool
    """Whether it is stored as it is, so that tensors need not be looked at one by one."""
    notes: dict[torch.Size, Json] = field(default_factory=dict)

    def note(self, tensor: Tensor) -> Json:
        """Returns the note of a packed tensor; for equal shapes the same object."""
        note = self.notes.get(tensor.shape)
        if note is None:
            described = TensorNote(tensor.dtype, tuple(tensor.shape), None, self.on_accelerator)
            note = self.notes[tensor.shape] = described.as_json()
        return note


class _Collected:
    """The tensors that `encode` finds in a state, sorted; implements `TensorSink`."""

    def __init__(self, accelerator: torch.device | None) -> None:
        self.large: dict[str, tuple[str, Tensor]] = {}
        self.packs: dict[str, _Pack] = {}
        self._accelerator = accelerator
        self._kinds: dict[tuple[torch.dtype, torch.layout, torch.device], _Kind] = {}

    def put(self, tensor: Tensor, location: Location) -> Json:
        kind = self._kinds.get((tensor.dtype, tensor.layout, tensor.device)) or self._new_kind(tensor, location)
        if tensor.numel() * kind.item_bytes >= LARGE_BYTES:
            entry = _unused(path_of(location), self.large)
            self.large[entry] = (kind.stored, tensor)
            return TensorNote(tensor.dtype, tuple(tensor.shape), entry, kind.on_accelerator).as_json()
        kind.pack.add(tensor if kind.is_plain else _as_stored(tensor))
        return kind.note(tensor)

    def put_uniform(self, tensors: list[Tensor]) -> Json | None:
        first = tensors[0]
        kind = self._kinds.get((first.dtype, first.layout, first.device)) or self._new_kind(first, (None, "list"))
        if not kind.is_plain or first.numel() * kind.item_bytes >= LARGE_BYTES or not _are_uniform(tensors):
            return None
        kind.pack.segments.append(_Segment(True, tensors))
        return kind.note(first)

    def _new_kind(self, tensor: Tensor, location: Location) -> _Kind:
        if tensor.dtype not in STORED or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path_of(location)}: a tensor of {tensor.dtype} and layout {tensor.layout} on {tensor.device} cannot "
                "be saved."
            )
        stored, plain = STORED[tensor.dtype]
        kind = _Kind(
            stored,
            self.packs.setdefault(stored, _Pack(stored)),
            tensor.device == self._accelerator,
            tensor.dtype.itemsize,
            tensor.dtype == plain,
        )
        self._kinds[tensor.dtype, tensor.layout, tensor.device] = kind
        return kind


def _are_uniform(tensors: list[Tensor]) -> bool:
    """Returns whether all are tensors of one type, dtype, layout, device and shape."""
    try:
        kinds = (
            {type(tensor) for tensor in tensors},
            {tensor.dtype for tensor in tensors},
            {tensor.layout for tensor in tensors},
            {tensor.device for tensor in tensors},
            {tensor.shape for tensor in tensors},
        )
    except AttributeError:  # something else among them
        return False
    return all(len(kind) == 1 for kind in kinds)


def _unused(entry: str, taken: Mapping[str, object]) -> str:
    """Returns the name, with a number if it is taken: keys that contain `/` may spell the same path twice."""
    name = entry
    count = 2
    while name in taken:
        name = f"{entry}#{count}"
        count += 1
    return name


# Copying.


def _as_stored(tensor: Tensor) -> Tensor:
    """Returns the elements in one row, of a dtype that every operation knows."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.reshape(-1) if not tensor.is_neg() else tensor.resolve_neg().reshape(-1)
    plain = STORED[tensor.dtype][1]
    return flat if flat.dtype == plain else reinterpret(flat, plain)


def _copy_large(large: Mapping[str, tuple[str, Tensor]], memory: HostMemory, name: str) -> list[_Copied]:
    """Copies large tensors, each as a whole: that is when memcpy goes around the caches."""
    copied: list[_Copied] = []
    on_host: list[tuple[Any, Any]] = []
    for entry, (stored, tensor) in large.items():
        shape = tuple(tensor.shape) + ((2,) if tensor.is_complex() else ())
        plain = STORED[tensor.dtype][1]
        block = memory.take(f"{name}:{entry}", math.prod(shape) * plain.itemsize)
        copied.append((entry, stored, shape, block))

        if not tensor.is_contiguous() and not tensor.is_complex() and tensor.dtype == plain:
            # In the order of the memory, without a temporary copy.
            reinterpret(block, plain).view(shape).copy_(tensor, non_blocking=True)
        elif tensor.device.type == "cpu":
            on_host.append((block.numpy(), reinterpret(_as_stored(tensor), torch.uint8).numpy()))
        else:
            reinterpret(block, plain).copy_(_as_stored(tensor), non_blocking=True)

    # NumPy releases the interpreter lock while it copies, so threads of Python are enough to use several cores.
    if sum(len(target) for target, _ in on_host) > _COPIED_ALONE_BYTES:
        with thread_pool() as pool:
            list(pool.map(lambda pair: np.copyto(*pair), on_host))
    else:
        for target, source in on_host:
            np.copyto(target, source)
    return copied


def _copy_pack(pack: _Pack, memory: HostMemory, name: str) -> _Copied:
    """Copies the small tensors of one dtype, many by one call, since a thousand calls take longer than the copying."""
    counts = [segment.numel() for segment in pack.segments]
    entry = f"packed/{pack.stored}"
    dtype = next(plain for stored, plain in STORED.values() if stored == pack.stored)
    block = memory.take(f"{name}:{entry}", sum(counts) * dtype.itemsize)

    for segment, target in zip(pack.segments, torch.split(reinterpret(block, dtype), counts), strict=True):
        tensors = segment.tensors
        if segment.uniform and tensors[0].device.type == "cpu":
            torch.stack(tensors, out=target.view(len(tensors), *tensors[0].shape))
        elif segment.uniform:
            target.copy_(torch.stack(tensors).reshape(-1))
        else:
            torch.cat(_on_host(tensors), out=target)
    return entry, pack.stored, (sum(counts),), block


def _on_host(tensors: list[Tensor]) -> list[Tensor]:
    """Returns all in one row each; those of a device are gathered there first, so that one transfer moves them."""
    flats = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors]
    for device in {tensor.device for tensor in flats} - {torch.device("cpu")}:
        indices = [index for index, tensor in enumerate(flats) if tensor.device == device]
        gathered = torch.cat([flats[index] for index in indices]).cpu()
        pieces = torch.split(gathered, [flats[index].numel() for index in indices])
        for index, piece in zip(indices, pieces, strict=True):
            flats[index] = piece
    return flats


def _width(stored: str) -> int:
    return next(plain.itemsize for name, plain in STORED.values() if name == stored)

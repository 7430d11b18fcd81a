"""A copy of the state of a run in memory, taken between two steps and written while training goes on."""

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
from distopt.checkpoint.codec import Json, Place, TensorNote, encode, path_of
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.statefile import MAX_JSON_BYTES, OWN_ENTRY_BYTES, STORED, bytes_of, reinterpret
from distopt.checkpoint.tensorfile import encode_header

# Memory of the host that tensors are copied to before they are written, kept from one save to the next.


_HUGE_BYTES = 4 << 20
_libc = ctypes.CDLL(None)


@contextmanager
def without_collection() -> Iterator[None]:
    """Makes no garbage collections: describing a state makes thousands of containers, and none of them is garbage.

    Their number would start a full collection now and then, which with torch loaded takes a tenth of a second.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def new_block(size: int, *, pinned: bool = False) -> Tensor:
    """Returns (size,) uint8, not filled.

    It asks for huge pages: the first touch of 1 GiB then costs 512 page faults and not 262,144.
    """
    block = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    if size >= _HUGE_BYTES and not pinned and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (block.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # A wish: a kernel without huge pages answers with an error and serves ordinary ones.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return block


class HostMemory:
    """Blocks by name: a save finds those of the save before, already paid for.

    Args:
        pinned: memory that takes part in copies from a GPU without a detour.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._blocks: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def take(self, name: str, size: int) -> Tensor:
        """Returns (size,) uint8; the block taken under that name before is overwritten by it."""
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


_COPIED_ALONE_BYTES = 16 << 20  # up to here starting threads takes longer than the copy
_COMPRESSION = 1  # level 9 takes ten times as long for a tenth less

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
        return [bytes_of(block) for *_, block in self.tensors]


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
        tree = encode(state, gathering, (None, name))
        tensors = _copy_own(gathering.own, memory, name)
        tensors += [_copy_pack(pack, memory, name) for pack in gathering.packs.values() if pack.parts]
    if accelerator is not None:
        torch.accelerator.synchronize(accelerator)
    tensors.sort(key=lambda tensor: (-_width(tensor[1]), tensor[0]))
    return Snapshot(tree, tuple(tensors))


@dataclass
class _Pack:
    """The small tensors of one stored dtype, in the order of the JSON."""

    stored: str
    parts: list[_Part] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        """Appends one tensor of any shape."""
        if not self.parts or self.parts[-1].alike:
            self.parts.append(_Part(False, []))
        self.parts[-1].tensors.append(tensor)


@dataclass
class _Part:
    """Tensors that follow each other."""

    alike: bool
    """All of one shape and on one device."""
    tensors: list[Tensor]

    def numel(self) -> int:
        """Returns the number of elements of all."""
        if self.alike:
            return self.tensors[0].numel() * len(self.tensors)
        return sum(tensor.numel() for tensor in self.tensors)


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

    def note(self, tensor: Tensor) -> Json:
        """Returns what stands for a packed tensor; of the same shape, the same object."""
        found = self.notes.get(tensor.shape)
        if found is None:
            described = TensorNote(tensor.dtype, tuple(tensor.shape), None, self.on_accelerator)
            found = self.notes[tensor.shape] = described.as_json()
        return found


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
        kind.pack.add(tensor if kind.is_plain else _as_stored(tensor))
        return kind.note(tensor)

    def put_alike(self, tensors: list[Tensor]) -> Json | None:
        first = tensors[0]
        kind = self._kinds.get((first.dtype, first.layout, first.device)) or self._new_kind(first, (None, "list"))
        if not kind.is_plain or first.numel() * kind.item_bytes >= OWN_ENTRY_BYTES or not _are_alike(tensors):
            return None
        kind.pack.parts.append(_Part(True, tensors))
        return kind.note(first)

    def _new_kind(self, tensor: Tensor, where: Place) -> _Kind:
        if tensor.dtype not in STORED or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path_of(where)}: a tensor of {tensor.dtype} and layout {tensor.layout} on {tensor.device} cannot be "
                "saved."
            )
        stored, plain = STORED[tensor.dtype]
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


def _are_alike(tensors: list[Tensor]) -> bool:
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


def _as_stored(tensor: Tensor) -> Tensor:
    """Returns the elements in one row, of a dtype that every operation knows."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.reshape(-1) if not tensor.is_neg() else tensor.resolve_neg().reshape(-1)
    plain = STORED[tensor.dtype][1]
    return flat if flat.dtype == plain else reinterpret(flat, plain)


def _copy_own(own: Mapping[str, tuple[str, Tensor]], memory: HostMemory, name: str) -> list[_Copied]:
    """Copies tensors that have entries of their own, each whole: that is when memcpy goes around the caches."""
    copied, on_host = [], []
    for entry, (stored, tensor) in own.items():
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
    if sum(len(target) for target, _ in on_host) > _COPIED_ALONE_BYTES:
        with thread_pool() as pool:
            list(pool.map(lambda pair: np.copyto(*pair), on_host))
    else:
        for pair in on_host:
            np.copyto(*pair)
    return copied


def _copy_pack(pack: _Pack, memory: HostMemory, name: str) -> _Copied:
    """Gathers the small tensors of one dtype, by one call for many, since a thousand take longer than the copying."""
    counts = [part.numel() for part in pack.parts]
    entry = f"packed/{pack.stored}"
    dtype = next(plain for stored, plain in STORED.values() if stored == pack.stored)
    block = memory.take(f"{name}:{entry}", sum(counts) * dtype.itemsize)
    for part, target in zip(pack.parts, torch.split(reinterpret(block, dtype), counts), strict=True):
        if part.alike and part.tensors[0].device.type == "cpu":
            torch.stack(part.tensors, out=target.view(len(part.tensors), *part.tensors[0].shape))
        elif part.alike:
            target.copy_(torch.stack(part.tensors).reshape(-1))
        else:
            torch.cat(_on_host(part.tensors), out=target)
    return entry, pack.stored, (sum(counts),), block


def _on_host(tensors: list[Tensor]) -> list[Tensor]:
    """Returns all in one row each; those of a device are gathered there first, so that one transfer moves them."""
    flats = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors]
    for device in {tensor.device for tensor in flats} - {torch.device("cpu")}:
        places = [index for index, tensor in enumerate(flats) if tensor.device == device]
        gathered = torch.cat([flats[index] for index in places]).cpu()
        for index, piece in zip(places, torch.split(gathered, [flats[index].numel() for index in places]), strict=True):
            flats[index] = piece
    return flats


def _width(stored: str) -> int:
    return next(plain.itemsize for name, plain in STORED.values() if name == stored)


def _unused(entry: str, taken: Mapping[str, object]) -> str:
    name, count = entry, 2
    while name in taken:
        name, count = f"{entry}#{count}", count + 1
    return name

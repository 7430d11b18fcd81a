"""Memory of the host that tensors are copied to before they are written, kept from one save to the next."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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

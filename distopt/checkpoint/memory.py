"""Memory of the host that tensors are copied to before they are written, kept from one save to the next."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_BYTES = 4 << 20


def host_bytes(size: int, *, pinned: bool = False) -> Tensor:
    """Returns uninitialised memory, (size,) uint8.

    Large blocks ask the kernel for huge pages: the first touch of 1 GiB then costs 512 page faults and not 262,144,
    which is most of what a first copy costs. Pinned memory takes part in copies from a GPU without a detour.
    """
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    if size < _HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them serves ordinary pages
    return torch.frombuffer(block, dtype=torch.uint8)


class HostMemory:
    """Blocks by name: a save finds those of the save before, already paid for."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._blocks: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def take(self, name: str, size: int) -> Tensor:
        """Returns (size,) uint8; the block taken under that name before is overwritten by it."""
        block = self._blocks.get(name)
        if block is None or len(block) != size:
            self._blocks.pop(name, None)
            block = self._blocks[name] = host_bytes(size, pinned=self._pinned)
        self._used.add(name)
        return block

    def trim(self) -> None:
        """Frees the blocks that were not taken since the last call: of parameters that are gone."""
        for name in self._blocks.keys() - self._used:
            del self._blocks[name]
        self._used.clear()

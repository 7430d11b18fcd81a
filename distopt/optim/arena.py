"""Packed storage: parameters that stay the user's own tensors while their bytes lie side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
MAX_NUMEL = 32_768
"""Parameters beyond this many elements gain nothing from packing: the copy of their gradient costs more than a call."""

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def num_aliases(p: Tensor) -> float:
    """Returns how many other tensors use the memory of `p`; infinity when its bytes cannot be packed at all.

    They can when `p` is a small dense tensor that covers its storage, which neither a file nor another process shares.
    With no alias no other tensor can notice. An array of numpy from which `p` was made stays as it is then: torch
    cannot tell its memory from that of a loaded file, and parameters that come from a checkpoint must be quick.
    """
    if (
        type(p) not in (Tensor, torch.nn.Parameter)
        or p.layout is not torch.strided
        or p.dtype not in DTYPES
        or p.device.type not in ("cpu", "cuda")
        or not 0 < p.numel() <= MAX_NUMEL
        or not p.is_contiguous()
        or p.is_neg()
        or _use_count is None
    ):
        return math.inf
    storage = p.untyped_storage()
    if storage.nbytes() != p.numel() * p.element_size() or (p.device.type == "cpu" and storage.is_shared()):
        return math.inf
    if storage.filename is not None:
        return math.inf
    return float(_use_count(storage._cdata) - 2)  # without p itself and `storage` here


class Arena:
    """One flat tensor whose slices are the data of many parameters.

    Each parameter gets a storage object of its own that covers exactly its bytes, so that saving, pickling and copying
    one parameter never touch its neighbours; a step on `flat` updates them all.

    Args:
        params: packable tensors of one dtype and device; their `.data` is replaced by equal data.

    Attributes:
        flat: shape (sum of numels,), the parameters in row-major order one behind the other.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        first = params[0]
        self.numels = [p.numel() for p in params]
        self.flat = torch.empty(sum(self.numels), dtype=first.dtype, device=first.device)
        with torch.no_grad():
            torch.cat([p.detach().reshape(-1) for p in params], out=self.flat)
            for p, segment in zip(params, torch.split(self.flat, self.numels), strict=True):
                p.data = from_dlpack(segment).view(p.shape)
        self.pointers = [p.data_ptr() for p in params]

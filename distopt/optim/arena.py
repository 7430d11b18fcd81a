"""Packed storage: parameters that stay the user's own tensors while their bytes lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
MAX_NUMEL = 32_768
"""Parameters beyond this many elements gain nothing from packing: the copy of their gradient costs more than a call."""

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_home: Any = WeakTensorKeyDictionary()  # parameter -> the address that an arena gave it


def is_packable(p: Tensor) -> bool:
    """Returns whether the bytes of `p` may be moved without anybody noticing.

    They may when `p` is a small dense tensor that alone uses its storage, and torch allocated that storage (memory of
    numpy, of a file or of another process has owners that torch does not know).
    """
    return (
        type(p) in (Tensor, torch.nn.Parameter)
        and p.layout is torch.strided
        and p.dtype in DTYPES
        and p.device.type in ("cpu", "cuda")
        and 0 < p.numel() <= MAX_NUMEL
        and p.is_contiguous()
        and not p.is_neg()
        and _is_alone_in_its_storage(p)
    )


def _is_alone_in_its_storage(p: Tensor) -> bool:
    storage = p.untyped_storage()
    if storage.nbytes() != p.numel() * p.element_size() or (p.device.type == "cpu" and storage.is_shared()):
        return False
    # Two uses: the tensor's and that of `storage` here.
    return (
        _use_count is not None
        and _use_count(storage._cdata) <= 2
        and (storage.resizable() or _home.get(p) == p.data_ptr())
    )


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
            for p, segment in zip(params, self.flat.split(self.numels), strict=True):
                p.data = torch.from_dlpack(segment).view(p.shape)
        self.pointers = [p.data_ptr() for p in params]
        for p, pointer in zip(params, self.pointers, strict=True):
            _home[p] = pointer

"""Which parameters all ranks know, in one order, and in which buffers their gradients travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from distopt.backends import Json
from distopt.reduce.messages import NUM_SLOTS

MIB = 2**20
LOOK_FIRST_BYTES = 4 * MIB
"""Gradients in several buckets and beyond this size are sent after the ranks have seen that nobody has news."""
LARGE_NUMEL = 2**15
"""From this many elements on a pass over a gradient costs more than a call, and allocating it more than either."""


@dataclass(frozen=True)
class Entry:
    """A parameter as all ranks agree on it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str  # its type: all ranks keep it on a GPU, or none does
    sparse: bool  # whether its gradient is exchanged as a sparse tensor
    constraint: str  # description, as JSON text

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype in which its gradient is summed: complex numbers travel as pairs."""
        return self.dtype.to_real()

    @property
    def numel(self) -> int:
        """Elements of its gradient in `real_dtype`."""
        return torch.Size(self.shape).numel() * (2 if self.dtype.is_complex else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of its gradient."""
        return self.numel * self.real_dtype.itemsize

    def describe(self) -> Json:
        """Returns what the ranks compare."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": dtype, "device": self.device, "constraint": self.constraint}


class Bucket:
    """Gradients that travel in one buffer, with the control slots behind them in one of the buckets.

    Attributes:
        indices: the parameters' places in the layout.
        buffer: shape (numel + slots,), what is sent.
        flat: shape (numel,), the gradients in it.
        views: one per parameter, its gradient in `flat`, in the parameter's shape and dtype.
        addresses: where each of them starts; -1 for empty ones.
        is_large: whether a pass over one of its gradients costs more than a call for each.
        is_1d: whether they are vectors of real numbers, which can be copied in one call.
        slots: the control slots in `buffer`; None in the buckets that do not carry them.
    """

    def __init__(
        self, indices: Sequence[int], entries: Sequence[Entry], device: torch.device, num_slots: int = 0
    ) -> None:
        self.indices, self.entries = tuple(indices), tuple(entries)
        self.offsets = list(accumulate((entry.numel for entry in entries), initial=0))
        numel, dtype = self.offsets[-1], entries[0].real_dtype if entries else torch.float32
        self.buffer = torch.zeros(numel + num_slots, dtype=dtype, device=device)
        self.flat = self.buffer[:numel]
        self.slots = self.buffer[numel:] if num_slots else None
        self.is_complex = bool(entries) and entries[0].dtype.is_complex
        self.views = [
            _view(self.flat[start:stop], entry)
            for entry, start, stop in zip(entries, self.offsets, self.offsets[1:], strict=False)
        ]
        self.addresses = [view.data_ptr() if view.numel() else -1 for view in self.views]
        self.is_large = numel > LARGE_NUMEL * len(self.views)
        self.is_1d = not self.is_complex and all(view.dim() == 1 for view in self.views)
        self.names = tuple(entry.name for entry in entries)


class Layout:
    """The parameters known to all ranks, sorted by name, and their buckets.

    The control slots ride in the first bucket, or travel alone where it cannot carry them or the model is large: then
    they are looked at before gradients are sent.

    Args:
        entries: the parameters.
        params: this rank's tensors, by name.
        bucket_mib: Largest bucket in MiB; a larger parameter has one of its own.
        groups: Names that travel together, by group; the others are packed by size.
        rides: Whether control slots may ride in a bucket (its sum is plain), else they travel alone.
        control_device: Where they are when they travel alone.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        params: Mapping[str, Tensor],
        *,
        bucket_mib: float,
        groups: Sequence[Sequence[str]] | int = (),
        rides: bool = True,
        control_device: torch.device,
    ) -> None:
        self.entries = tuple(entries[name] for name in sorted(entries))
        self.names = tuple(entry.name for entry in self.entries)
        self.params = tuple(params[name] for name in self.names)
        # Identity, since tensors compare by element; `params` keeps them alive, so none is given another's id.
        self.index = {id(param): index for index, param in enumerate(self.params)}
        self.sparse = tuple(index for index, entry in enumerate(self.entries) if entry.sparse)
        num_slots = NUM_SLOTS + len(self.entries)
        dense = [index for index, entry in enumerate(self.entries) if not entry.sparse]
        parts = _split(dense, self.entries, bucket_mib, groups)
        num_bytes = sum(self.entries[index].num_bytes for index in dense)
        self.looks_first = len(parts) > 1 and num_bytes > LOOK_FIRST_BYTES
        rides = rides and not self.looks_first
        carrier = next((i for i, part in enumerate(parts) if rides and self._can_carry(part)), None)
        if carrier is not None:
            parts.insert(0, parts.pop(carrier))  # the control slots are waited for first
        self.buckets = [
            Bucket(
                part,
                [self.entries[index] for index in part],
                self.params[part[0]].device,
                num_slots if carrier is not None and number == 0 else 0,
            )
            for number, part in enumerate(parts)
        ]
        if carrier is None:
            self.buckets.insert(0, Bucket((), (), control_device, num_slots))
        slots = self.buckets[0].slots
        assert slots is not None
        self.slots = slots

    def _can_carry(self, part: Sequence[int]) -> bool:
        return self.entries[part[0]].real_dtype in (torch.float32, torch.float64)


def _view(flat: Tensor, entry: Entry) -> Tensor:
    if entry.dtype.is_complex:
        return torch.view_as_complex(flat.view(*entry.shape, 2))
    return flat.view(entry.shape)


def _split(
    indices: Sequence[int], entries: Sequence[Entry], bucket_mib: float, groups: Sequence[Sequence[str]] | int
) -> list[list[int]]:
    """Groups of one dtype and device, each under the bucket size, or as the user has grouped them."""
    if isinstance(groups, int):
        size = -(-len(indices) // groups) if groups else 0
        group_of = {entries[index].name: place // size for place, index in enumerate(indices)} if size else {}
    else:
        group_of = {name: number for number, group in enumerate(groups) for name in group}
    parts: list[list[int]] = []
    filling: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for index in indices:
        entry = entries[index]
        group = group_of.get(entry.name)
        key = (entry.dtype, entry.device, group)
        part, held = filling.get(key, ([], 0))
        if not part or (group is None and held + entry.num_bytes > bucket_mib * MIB):
            part, held = [], 0
            parts.append(part)
        part.append(index)
        filling[key] = (part, held + entry.num_bytes)
    return parts

"""Which parameters all ranks know, in one order, and in which buffers their gradients are reduced."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, compress, islice, zip_longest
from operator import attrgetter, eq, itemgetter

import numpy as np
import torch
from torch import Tensor

from distopt.backends import Json
from distopt.optim.packing import Segments
from distopt.reduce.messages import NUM_SLOTS

MIB = 2**20
CONTROL_FIRST_BYTES = 4 * MIB
"""Gradients in several buckets and beyond this size are sent after the ranks have seen that the layout is unchanged."""
LARGE_NUMEL = 2**15
"""From this many elements on a pass over a gradient costs more than a call, and allocating it more than either."""

AVERAGE_PREFIX = "__baseline_avg_downstream_cost_"
"""How Pyro names the parameters that are averages, kept by a loss: `tracegraph_elbo._construct_baseline`."""


@dataclass(frozen=True)
class ParamSpec:
    """A parameter as all ranks agree on it.

    Attributes:
        name: Its name in Pyro's parameter store.
        shape: Shape of its unconstrained value.
        dtype: Dtype of that value.
        device: Type of its device; all ranks keep it on a GPU, or none does.
        sparse: Whether its gradient is sent as a sparse tensor.
        constraint: Description of its constraint, as JSON text.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    sparse: bool
    constraint: str

    @cached_property
    def size(self) -> torch.Size:
        """Its shape as torch has it, which takes longer to make than anything else that a layout asks of it."""
        return torch.Size(self.shape)

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype in which its gradient is summed: a complex number is sent as two real ones."""
        return self.dtype.to_real()

    @cached_property
    def numel(self) -> int:
        """Number of elements of its gradient in `real_dtype`."""
        return math.prod(self.shape) * (2 if self.dtype.is_complex else 1)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of its gradient."""
        return self.numel * self.real_dtype.itemsize

    def describe(self) -> Json:
        """Returns what the ranks compare."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": dtype, "device": self.device, "constraint": self.constraint}


# Loops over the parameters that run inside the interpreter: a layout is made anew for each one of a model that grows.
_name, _size, _sparse = attrgetter("name"), attrgetter("size"), attrgetter("sparse")
_numel, _num_bytes, _kind = attrgetter("numel"), attrgetter("num_bytes"), attrgetter("dtype", "device")


class Bucket:
    """Gradients that are reduced in one buffer, in one of the buckets followed by the control slots.

    Args:
        indices: The parameters' indices in the layout.
        specs: The parameters, of one dtype and device.
        device: Where the buffer is.
        num_slots: Number of control slots; 0 in the buckets that do not carry them.

    Attributes:
        indices: As given.
        specs: As given.
        names: The parameters' names.
        buffer: (numel + num_slots,), the gradients' real dtype; what is sent.
        flat: (numel,), the gradients in `buffer`.
        offsets: Where each gradient starts in `flat`, and at last where the last one ends.
        is_complex: Whether the parameters are complex.
        max_numel: Elements of the largest gradient.
        is_large: Whether a pass over one of its gradients costs more than a call for each.
        slots: (num_slots,), the control slots in `buffer`; None in the buckets that do not carry them.
    """

    def __init__(
        self, indices: Sequence[int], specs: Sequence[ParamSpec], device: torch.device, num_slots: int = 0
    ) -> None:
        self.is_complex = bool(specs) and specs[0].dtype.is_complex
        self.indices: tuple[int, ...] = ()
        self.specs: tuple[ParamSpec, ...] = ()
        self.names: tuple[str, ...] = ()
        self.offsets = [0]
        self.max_numel = 0
        self._device = device
        self._segments = Segments(torch.empty(0), ())
        self._extend_(indices, specs, num_slots)

    def extended(self, indices: Sequence[int], specs: Sequence[ParamSpec], num_slots: int) -> Bucket:
        """Returns a bucket with further parameters behind its own; what that takes follows from their number.

        Of the others pointers are copied, and their gradients have a place in a buffer of zeros.
        """
        bucket = copy(self)
        bucket.__dict__.pop("addresses", None)
        bucket._extend_(indices, specs, num_slots)
        return bucket

    def _extend_(self, indices: Sequence[int], specs: Sequence[ParamSpec], num_slots: int) -> None:
        numels = list(map(_numel, specs))
        self.indices = (*self.indices, *indices)
        self.specs = (*self.specs, *specs)
        self.names = (*self.names, *map(_name, specs))
        self.offsets = [*self.offsets[:-1], *accumulate(numels, initial=self.offsets[-1])]

        numel = self.offsets[-1]
        dtype = self.specs[0].real_dtype if self.specs else torch.float32
        self.buffer = torch.zeros(numel + num_slots, dtype=dtype, device=self._device)
        self.flat = self.buffer[:numel]
        self.slots = self.buffer[numel:] if num_slots else None

        values = torch.view_as_complex(self.flat.view(-1, 2)) if self.is_complex else self.flat
        self._segments = self._segments.extended(values, list(map(_size, specs)))
        self.is_large = numel > LARGE_NUMEL * len(self.specs)
        self.max_numel = max([self.max_numel, *numels])
        self._saved: Tensor | None = None

    # Made when they are first asked for: in a model that grows the next layout follows at once, and a step of small
    # parameters needs neither.

    @property
    def views(self) -> list[Tensor]:
        """The gradient of each parameter in `flat`, in the parameter's shape and dtype."""
        return self._segments.views

    @cached_property
    def addresses(self) -> list[int]:
        """Memory address of each of the `views`; -1 for empty ones."""
        first, itemsize = self.flat.data_ptr(), self.flat.element_size()
        starts = zip(self.offsets, self.offsets[1:], strict=False)
        return [first + start * itemsize if start < end else -1 for start, end in starts]

    def may_hold(self, addresses: Sequence[int]) -> bool:
        """Returns whether one of these addresses is in the bucket; takes less than to make its `addresses`."""
        first = self.flat.data_ptr()
        after = first + self.flat.numel() * self.flat.element_size()
        is_beside = not addresses or max(addresses) < first or min(addresses) >= after
        if is_beside:
            return False
        at = np.array(addresses, dtype=np.uint64)
        return bool(((first <= at) & (at < after)).any())

    def holds(self, addresses: Sequence[int] | None) -> bool:
        """Returns whether gradients at these addresses, by index in the layout, lie in this bucket, each in its view.

        A captured step leaves them there, so that nothing needs to be copied.
        """
        return (
            addresses is not None
            and bool(self.indices)
            and addresses[self.indices[0]] == self.flat.data_ptr()
            and list(map(addresses.__getitem__, self.indices)) == self.addresses
        )

    def held(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Returns the indices of those gradients, by index in the layout, that lie in this bucket."""
        members = map(gradients.__getitem__, self.indices)
        at = [0 if each is None or each.is_sparse else each.data_ptr() for each in members]
        if not self.may_hold(at):
            return []
        return list(compress(self.indices, map(eq, at, self.addresses)))

    def save_(self) -> None:
        """Copies the gradients aside, for `restore_` after a round whose sums are thrown away."""
        if self._saved is None:
            self._saved = torch.empty_like(self.flat)
        self._saved.copy_(self.flat)

    def restore_(self) -> None:
        """Puts back what `save_` has copied."""
        assert self._saved is not None
        self.flat.copy_(self._saved)

    def saved_gradients(self) -> Iterator[tuple[int, Tensor]]:
        """Yields the gradients that `save_` has copied, each flat, with its parameter's index in the layout."""
        assert self._saved is not None
        return zip(self.indices, torch.split(self._saved, list(map(_numel, self.specs))), strict=True)

    @torch.no_grad()
    def fill_(
        self,
        gradients: Sequence[Tensor | None] | None,
        scale: float,
        *,
        complete: bool = False,
        addresses: Sequence[int] | None = None,
    ) -> None:
        """Overwrites the bucket with this rank's gradients times `scale`, and zeros where it has none.

        Args:
            gradients: By index in the layout; None where this rank has none, or for none at all.
            scale: What the gradients are multiplied by.
            complete: Whether none of them is None and none is sparse.
            addresses: Memory address of each, if they are known.
        """
        if gradients is None:
            self.buffer.zero_()
            return
        if complete and (not self.indices or self.holds(addresses)):
            if scale != 1.0:
                self.flat.mul_(scale)
            return
        chosen = list(map(gradients.__getitem__, self.indices))

        # Many small gradients: one call copies them all and one multiplies them, where the calls are what costs.
        if complete and chosen and not self.is_large:
            self._segments.copy_(chosen)  # type: ignore[arg-type]  # none is None
            if scale != 1.0:
                self.flat.mul_(scale)
            return

        # Large ones: a call for each that multiplies as it copies, where passing over the memory is what costs.
        for view, gradient in zip(self.views, chosen, strict=True):
            if gradient is None:
                view.zero_()
            else:
                torch.mul(gradient.to_dense() if gradient.is_sparse else gradient, scale, out=view)


class Layout:
    """The parameters known to all ranks, sorted by name, and their buckets.

    Ranks that know the same parameters and have the same options build the same layout without exchanging a message:
    buckets, their order and the order within them follow from names, shapes and dtypes alone.

    A layout may be `extended`, with new parameters behind the others; a layout made anew sorts them in.

    The control slots are carried by the first bucket. Where no bucket can carry them, and where the model is large,
    they have a bucket without gradients: then they are reduced before any gradient is sent.

    Args:
        specs: The parameters, by name.
        params: This rank's tensors, by name.
        bucket_mib: Largest bucket in MiB; a larger parameter has a bucket for itself.
        groups: Names that share a bucket, by group, or a number of groups; the others are packed by size.
        carries_control: Whether a bucket with gradients may carry the control slots, because its sum is exact.
        control_device: Where the slots are when they have a bucket for themselves.

    Attributes:
        specs: The parameters, sorted by name but for those that it was extended by.
        names: Their names.
        params: This rank's tensors.
        index: Index of each parameter, by `id` of its tensor.
        sparse: Indices of the parameters with sparse gradients, which are in no bucket.
        averages: Indices of the parameters that a loss sets to averages, see `RunningAverages`.
        control_first: Whether the control slots are reduced before gradients are sent.
        buckets: The one with the control slots first, then the others in the order of names.
        slots: (NUM_SLOTS + number of parameters,), the control slots.
        is_sorted: Whether it was not extended.
    """

    def __init__(
        self,
        specs: Mapping[str, ParamSpec],
        params: Mapping[str, Tensor],
        *,
        bucket_mib: float,
        groups: Sequence[Sequence[str]] | int = (),
        carries_control: bool = True,
        control_device: torch.device,
    ) -> None:
        self.names = tuple(sorted(specs))
        self.specs = tuple(map(specs.__getitem__, self.names))
        self.params = tuple(map(params.__getitem__, self.names))
        # By identity, since tensors compare by element; `params` keeps them alive, so no other tensor gets their id.
        every = range(len(self.names))
        self.index = dict(zip(map(id, self.params), every, strict=True))
        self.sparse = tuple(compress(every, map(_sparse, self.specs)))
        # Names are sorted, so those with one prefix are neighbours.
        first = bisect_left(self.names, AVERAGE_PREFIX)
        after = bisect_right(self.names, AVERAGE_PREFIX, key=itemgetter(slice(len(AVERAGE_PREFIX))))
        self.averages = tuple(range(first, after))

        dense = [index for index in every if not self.specs[index].sparse] if self.sparse else every
        members = _split(dense, self.specs, bucket_mib, groups)
        self._num_bytes = sum(map(_num_bytes, (self.specs[index] for index in dense) if self.sparse else self.specs))
        self.control_first = len(members) > 1 and self._num_bytes > CONTROL_FIRST_BYTES
        self.is_sorted = True
        self._bucket_mib = bucket_mib
        self._has_groups = bool(groups)
        self._by_name = specs

        # The bucket with the control slots comes first, since its result says what to make of the others.
        num_slots = NUM_SLOTS + len(self.specs)
        carrier = self._find_carrier(members) if carries_control and not self.control_first else None
        if carrier is not None:
            members.insert(0, members.pop(carrier))
        self.buckets = [
            Bucket(
                indices,
                list(map(self.specs.__getitem__, indices)),
                self.params[indices[0]].device,
                num_slots if carrier is not None and number == 0 else 0,
            )
            for number, indices in enumerate(members)
        ]
        if carrier is None:
            self.buckets.insert(0, Bucket((), (), control_device, num_slots))

    @property
    def slots(self) -> Tensor:
        """The control slots, shape (NUM_SLOTS + number of parameters,)."""
        slots = self.buckets[0].slots
        assert slots is not None
        return slots

    # A model that grows has a new layout at each of its parameters. Made anew it takes a pass over all of them, of some
    # microseconds for each, which is more than a step takes. Here what is new goes behind the rest of its kind, so that
    # of the others pointers are copied, and the sums of a round may be kept. The order is the same on all ranks, as it
    # follows from the agreements; once no parameter has come for a while the reducer makes the sorted layout.

    def extended(self, specs: Mapping[str, ParamSpec], params: Mapping[str, Tensor]) -> Layout | None:
        """Returns the layout with new parameters behind the others; None where it has to be made anew.

        Args:
            specs: All parameters by name: its own, unchanged, then the new ones.
            params: This rank's tensors, by name.
        """
        new = list(islice(specs.values(), len(self.names), None))
        if not self.names or self._has_groups or any(map(_is_special, new)):
            return None
        names = tuple(map(_name, new))
        added = tuple(map(params.__getitem__, names))
        every = range(len(self.names), len(self.names) + len(new))

        layout = copy(self)
        layout.is_sorted = False
        layout._by_name = specs
        layout.specs = (*self.specs, *new)
        layout.names = (*self.names, *names)
        layout.params = (*self.params, *added)
        layout.index = self.index | dict(zip(map(id, added), every, strict=True))
        layout.buckets = list(self.buckets)
        for position, indices in self._assign(new).items():
            of_bucket = [layout.specs[index] for index in indices]
            if position < len(self.buckets):
                layout.buckets[position] = self.buckets[position].extended(indices, of_bucket, 0)
            else:
                layout.buckets.append(Bucket(indices, of_bucket, layout.params[indices[0]].device))
        layout.buckets[0] = layout.buckets[0].extended((), (), NUM_SLOTS + len(layout.specs))

        layout._num_bytes += sum(map(_num_bytes, new))
        num_filled = sum(bool(bucket.specs) for bucket in layout.buckets)
        is_large = num_filled > 1 and layout._num_bytes > CONTROL_FIRST_BYTES
        return layout if is_large == self.control_first else None

    def _assign(self, new: Sequence[ParamSpec]) -> dict[int, list[int]]:
        """Returns which bucket takes up which new parameters: the last of their kind, or another if it is full."""
        is_open = {_kind(bucket.specs[0]): position for position, bucket in enumerate(self.buckets) if bucket.specs}
        sizes = [bucket.flat.nbytes for bucket in self.buckets]
        assigned: dict[int, list[int]] = {}
        for index, spec in enumerate(new, len(self.names)):
            position = is_open.get(_kind(spec))
            if position is None or sizes[position] + spec.num_bytes > self._bucket_mib * MIB:
                position = is_open[_kind(spec)] = len(sizes)
                sizes.append(0)
            sizes[position] += spec.num_bytes
            assigned.setdefault(position, []).append(index)
        return assigned

    @torch.no_grad()
    def take_sums_(self, kept: Sequence[Tensor], new: Layout) -> None:
        """Overwrites the buckets with sums.

        Args:
            kept: Those of the parameters before it was extended last, one 1-D tensor for each bucket that there was.
            new: A layout of the parameters that it was extended by, whose buckets hold the other sums.
        """
        segments: dict[int, Tensor] = {}
        for bucket in new.buckets:
            numels = list(map(_numel, bucket.specs))
            segments.update(zip(bucket.indices, torch.split(bucket.flat, numels), strict=True))

        num_known = len(self.names) - len(new.names)
        for bucket, sums in zip_longest(self.buckets, kept):
            first = bisect_left(bucket.indices, num_known)
            of_new = [segments[index - num_known] for index in bucket.indices[first:]]
            if of_new:
                torch.cat([*([] if sums is None else [sums]), *of_new], out=bucket.flat)
            else:
                bucket.flat.copy_(sums)  # onto itself, but for sums that were copied aside

    def named(self, indices: Iterable[int]) -> list[tuple[str, Tensor]]:
        """Returns names and tensors of some of the parameters."""
        return [(self.names[index], self.params[index]) for index in indices]

    def specs_by_name(self) -> dict[str, ParamSpec]:
        """Returns the parameters by name, in its order."""
        return dict(zip(self.names, self.specs, strict=True))

    def has_name(self, name: str) -> bool:
        """Returns whether it has a parameter of that name."""
        return name in self._by_name

    def gradient_buffers(self) -> dict[int, Tensor]:
        """Returns where the gradient of each dense parameter may be left, so that it need not be copied: by id."""
        return {
            id(self.params[index]): view
            for bucket in self.buckets
            for index, view in zip(bucket.indices, bucket.views, strict=True)
        }

    def _find_carrier(self, members: Sequence[Sequence[int]]) -> int | None:
        """Returns the first bucket in whose dtype small whole numbers are summed exactly (see `messages`)."""
        exact = (torch.float32, torch.float64)
        return next((i for i, each in enumerate(members) if self.specs[each[0]].real_dtype in exact), None)


def _is_special(spec: ParamSpec) -> bool:
    return spec.sparse or spec.name.startswith(AVERAGE_PREFIX)


def _split(
    indices: Sequence[int], specs: Sequence[ParamSpec], bucket_mib: float, groups: Sequence[Sequence[str]] | int
) -> list[list[int]]:
    """Returns the members of each bucket: one dtype and device, below the size or as the user has grouped them."""
    # The usual case, which a model that grows asks for at each of its parameters.
    chosen = specs if len(indices) == len(specs) else [specs[index] for index in indices]
    if not groups and len(set(map(_kind, chosen))) == 1 and sum(map(_num_bytes, chosen)) <= bucket_mib * MIB:
        return [list(indices)]

    if isinstance(groups, int):
        size = -(-len(indices) // groups) if groups else 0
        group_of = {specs[index].name: number // size for number, index in enumerate(indices)} if size else {}
    else:
        group_of = {name: number for number, group in enumerate(groups) for name in group}

    members: list[list[int]] = []
    open_buckets: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for index in indices:
        spec = specs[index]
        group = group_of.get(spec.name)
        key = (spec.dtype, spec.device, group)
        bucket, num_bytes = open_buckets.get(key, ([], 0))
        if not bucket or (group is None and num_bytes + spec.num_bytes > bucket_mib * MIB):
            bucket, num_bytes = [], 0
            members.append(bucket)
        bucket.append(index)
        open_buckets[key] = (bucket, num_bytes + spec.num_bytes)
    return members

"""Packed memory: parameters, and their gradients, side by side in one flat tensor.

A torch call on a tensor of ten numbers takes as long as one on a thousand, so a thousand small parameters are stepped
in one call where their bytes are consecutive. Parameters stay the user's tensors: only the memory behind them moves.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from itertools import accumulate
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

logger = logging.getLogger("distopt.optim")

_address = Tensor.data_ptr
_gradient = attrgetter("grad")

# Loops over many small tensors. Each takes a few nanoseconds per tensor where it is compiled (`_bulk.cpp`, when distopt
# was installed with a compiler at hand), and otherwise what Python's own C loops (`map`, `all`) take, about 50 ns. The
# compiled ones return NotImplemented for anything out of the ordinary (a subclass of Tensor, a fake or a sparse one),
# so that the two always agree: tests/optim/test_packing.py compares them.


def _load_compiled() -> Any:
    """Returns the compiled loops; None where there are none, or they were compiled for another torch."""
    try:
        from distopt.optim import _bulk
        from distopt.optim._bulk import adam  # noqa: F401  # a build of an older source lacks it
    except ImportError as error:
        logger.debug("loops over parameters run in Python: %s", error)
        return None
    if str(torch.__version__) != _bulk.TORCH:
        logger.debug("loops over parameters run in Python: they are compiled for torch %s", _bulk.TORCH)
        return None
    return _bulk


_compiled = _load_compiled()


def compiled_loops() -> Any:
    """Returns the compiled loops; None where there are none."""
    return _compiled


def same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Returns whether both tuples hold the same objects in the same order."""
    if _compiled is not None:
        return _compiled.same(some, others)  # type: ignore[no-any-return]
    return len(some) == len(others) and all(map(is_, some, others))


def addresses(params: tuple[Tensor, ...]) -> Any:
    """Returns where in memory `params` are, to be compared with what this returned for the same ones before."""
    result = NotImplemented if _compiled is None else _compiled.addresses(params)
    return list(map(_address, params)) if result is NotImplemented else result


def bump_versions(params: tuple[Tensor, ...]) -> None:
    """Lets autograd know that `params` were changed in place."""
    if _compiled is None or _compiled.bump(params) is NotImplemented:
        torch.autograd.graph.increment_version(params)


def has_dense_gradients(params: tuple[Tensor, ...]) -> bool:
    """Returns whether each of `params` has a gradient, strided and contiguous."""
    result = NotImplemented if _compiled is None else _compiled.dense(params)
    return all(map(_is_dense, map(_gradient, params))) if result is NotImplemented else result


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is torch.strided and gradient.is_contiguous()


def gather(params: tuple[Tensor, ...], home: Tensor, buffer: Tensor) -> bool | None:
    """Copies each parameter's `.grad` side by side into `buffer` by the compiled loop.

    Args:
        params: Exactly those whose memory `home` is made of, in order.
        home: Shape (sum of numels,).
        buffer: Shape, dtype and device of `home`.

    Returns:
        True when done; False when the parameters do not fill `home` any more; None when the loop is not compiled or
        something is out of the ordinary (no gradient, a sparse one, another device), so that Python must see to it.
        Unless True, `buffer` holds anything.
    """
    result = NotImplemented if _compiled is None else _compiled.gather(params, home, buffer)
    return None if result is NotImplemented else result


# Which parameters may be packed. Moving a parameter's bytes is invisible to everybody who reads it through the tensor;
# it would be seen by another tensor, a file or a process that shares the memory. So the question is not what a
# parameter is but who else holds its storage.

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
DEVICE_TYPES = frozenset({"cpu", "cuda"})
"""Devices on which packing was tried."""
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
        or p.device.type not in DEVICE_TYPES
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

    Each parameter gets a storage object that covers exactly its bytes, so that saving, pickling and copying one
    parameter never touch its neighbours; a step on `flat` updates them all.

    Args:
        params: Packable tensors of one dtype and device; their `.data` is replaced by equal data.

    Attributes:
        params: As given.
        numels: Number of elements of each parameter.
        flat: Shape (sum of numels,), the parameters in row-major order one behind the other.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        first = params[0]
        self.params = tuple(params)
        self.numels = [p.numel() for p in params]
        self.flat = torch.empty(sum(self.numels), dtype=first.dtype, device=first.device)

        with torch.no_grad():
            torch.cat([p.detach().reshape(-1) for p in params], out=self.flat)
            for p, segment in zip(params, torch.split(self.flat, self.numels), strict=True):
                # A view would keep the storage of `flat`, all of it: pickling one parameter would write its neighbours,
                # and `num_aliases` would count them. DLPack makes a storage of the segment alone.
                p.data = from_dlpack(segment).view(p.shape)
        self._addresses = [p.data_ptr() for p in params]

    def holds(self, index: int) -> bool:
        """Returns whether the parameter of that index is still where it was packed, with as many elements."""
        p = self.params[index]
        return p.data_ptr() == self._addresses[index] and p.numel() == self.numels[index] and p.is_contiguous()

    def is_whole(self) -> bool:
        """Returns whether all parameters are where they were packed, by loops that run inside the interpreter."""
        return (
            list(map(Tensor.data_ptr, self.params)) == self._addresses
            and list(map(Tensor.numel, self.params)) == self.numels
            and all(map(Tensor.is_contiguous, self.params))
        )


# Gradients side by side.


class FlatGradients(NamedTuple):
    """Gradients of several dense parameters of one dtype and device side by side in one 1-D buffer.

    Attributes:
        names: Parameter-store names, one per parameter.
        params: The unconstrained leaf tensors, in the order of `names`.
        buffer: Shape (sum of numels,), dtype of the parameters; the gradients in that order, each in row-major order.
            Whoever receives it may overwrite it.

    The steady state is recognised by the identity of the `params` tuple: hand over the same tuple object each step.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    buffer: Tensor

    def offsets(self) -> list[int]:
        """Returns where each gradient starts in `buffer`, and at last where the last one ends."""
        return list(accumulate(map(Tensor.numel, self.params), initial=0))


class Segments:
    """Consecutive segments of a flat tensor, each of which holds the elements of one tensor in row-major order.

    Tensors whose shapes differ in the first dimension only are one tensor when they are concatenated, which one call
    does in a third to a half of the time that copying into a view of each takes. Others (scalars, matrices of several
    widths) have no dimension along which they could be joined.

    Args:
        flat: Shape (sum of numels,).
        shapes: Shapes of the tensors, in order.
    """

    def __init__(self, flat: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        self._shapes: list[torch.Size] = []
        self._rows: set[tuple[int, torch.Size]] = set()
        self._extend_(flat, shapes)

    def extended(self, flat: Tensor, shapes: Sequence[Sequence[int]]) -> Segments:
        """Returns the segments of a longer flat tensor, with those of further shapes behind the present ones."""
        segments = copy(self)
        segments.__dict__.pop("views", None)
        segments._extend_(flat, shapes)
        return segments

    def _extend_(self, flat: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        self._flat = flat
        # A subclass of Tensor may have tuples, as Pyro's ProvenanceTensor has; to make a Size takes ten times as long.
        sizes = [shape if type(shape) is torch.Size else torch.Size(shape) for shape in shapes]
        self._shapes = [*self._shapes, *sizes]
        self._rows = self._rows.union((len(shape), shape[1:]) for shape in set(sizes))
        self._joined: Tensor | None = None
        if len(self._rows) == 1 and len(self._shapes[0]) > 0:
            row = self._shapes[0][1:]
            self._joined = flat.view(-1, *row) if row.numel() else flat.view(sum(s[0] for s in self._shapes), *row)

    @cached_property
    def views(self) -> list[Tensor]:
        """The segments, each in its tensor's shape."""
        segments = torch.split_with_sizes(self._flat, [shape.numel() for shape in self._shapes])
        return [segment.view(shape) for segment, shape in zip(segments, self._shapes, strict=True)]

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites all segments with dense `tensors` of their shapes, dtype and device; no gradient is recorded."""
        if self._joined is not None:
            torch.cat(list(tensors), out=self._joined)
        elif self._shapes:
            torch._foreach_copy_(self.views, list(tensors))


# Parameters whose gradients are copied at a time where Python does it: what torch keeps of so many tensors fits a
# second-level cache, so that the check of their addresses, which reads it first, pays for the copy's reads.
_BLOCK_SIZE = 200


class GradientBuffer:
    """The gradients of an arena's parameters, side by side in the order of the arena.

    Args:
        arena: The parameters.

    Attributes:
        flat: Shape, dtype and device of `arena.flat`.
    """

    def __init__(self, arena: Arena) -> None:
        self.flat = torch.empty_like(arena.flat)
        self._arena = arena
        self._blocks: list[tuple[tuple[Tensor, ...], Any, Segments]] = []

    def gather_(self, gradients: Sequence[Tensor] | None = None) -> Tensor | None:
        """Copies `gradients`, or each parameter's `.grad`, into `flat`.

        Args:
            gradients: One per parameter, of its shape.

        Returns:
            `flat`; None when a parameter was moved to other memory, so that the arena is not what must be stepped.

        Raises:
            TypeError: A parameter has no gradient.
            RuntimeError: A gradient is sparse.
        """
        arena = self._arena
        done = None if gradients is not None else gather(arena.params, arena.flat, self.flat)
        if done is not None:
            return self.flat if done else None

        if not self._blocks and not self._make_blocks():
            return None
        start = 0
        for params, at, segments in self._blocks:
            if addresses(params) != at:
                return None
            end = start + len(params)
            segments.copy_(list(map(_gradient, params)) if gradients is None else gradients[start:end])
            start = end
        return self.flat

    def write_back(self) -> None:
        """Copies what was gathered back to each parameter's `.grad`, in place."""
        torch._foreach_copy_(list(map(_gradient, self._arena.params)), self._segments.views)

    @cached_property
    def _segments(self) -> Segments:
        return Segments(self.flat, [p.shape for p in self._arena.params])

    def _make_blocks(self) -> bool:
        """Divides the parameters into blocks; returns False when one of them is no longer in the arena."""
        params = self._arena.params
        if not all(map(self._arena.holds, range(len(params)))):
            return False

        ends = list(accumulate(self._arena.numels, initial=0))
        for start in range(0, len(params), _BLOCK_SIZE):
            block = params[start : start + _BLOCK_SIZE]
            segment = self.flat[ends[start] : ends[start + len(block)]]
            self._blocks.append((block, addresses(block), Segments(segment, [p.shape for p in block])))
        return True

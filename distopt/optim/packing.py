"""Packed storage: parameters that stay the user's own tensors while their bytes lie side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

# Loops over many small tensors: compiled where that was possible when distopt was installed, else in Python.


_address = Tensor.data_ptr
_gradient = attrgetter("grad")

logger = logging.getLogger("distopt.optim")


def _loaded() -> Any:
    """Returns the compiled loops, None where there are none or they were compiled for another torch."""
    try:
        from distopt.optim import _bulk
    except ImportError as error:
        logger.debug("loops over parameters run in Python: %s", error)
        return None
    if str(torch.__version__) != _bulk.TORCH:
        logger.debug("loops over parameters run in Python: they are compiled for torch %s", _bulk.TORCH)
        return None
    return _bulk


_compiled = _loaded()


def same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Returns whether both hold the same objects, in one order."""
    if _compiled is not None:
        return _compiled.same(some, others)  # type: ignore[no-any-return]
    return len(some) == len(others) and all(map(is_, some, others))


def places(params: tuple[Tensor, ...]) -> Any:
    """Returns where in memory `params` lie, to be compared with what this returned for the same ones before."""
    found = NotImplemented if _compiled is None else _compiled.places(params)
    return list(map(_address, params)) if found is NotImplemented else found


def bump_versions(params: tuple[Tensor, ...]) -> None:
    """Lets autograd know that `params` were changed in place."""
    if _compiled is None or _compiled.bump(params) is NotImplemented:
        torch.autograd.graph.increment_version(params)


def has_dense_gradients(params: tuple[Tensor, ...]) -> bool:
    """Returns whether each of `params` has a gradient, strided and contiguous."""
    found = NotImplemented if _compiled is None else _compiled.dense(params)
    return all(map(_is_dense, map(_gradient, params))) if found is NotImplemented else found


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is torch.strided and gradient.is_contiguous()


def gather(params: tuple[Tensor, ...], home: Tensor, buffer: Tensor) -> bool | None:
    """Copies each parameter's `.grad` side by side into `buffer`, if that can be compiled.

    Args:
        params: exactly those whose memory `home` is made of, in order.
        home: shape (sum of numels,).
        buffer: shape, dtype and device of `home`.

    Returns:
        True when done; False when the parameters do not fill `home` any more; None when something is out of the
        ordinary (no gradient, a sparse one, another device), so that Python must see to it. Unless True, `buffer`
        holds anything.
    """
    found = NotImplemented if _compiled is None else _compiled.gather(params, home, buffer)
    return None if found is NotImplemented else found


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


# Gradients of many parameters copied side by side, a block at a time so that each is read while it is in the cache.


class Segments:
    """Consecutive segments of a flat tensor, each of which holds the elements of one tensor in row-major order.

    Tensors whose shapes differ in the first dimension only are one tensor when they are concatenated, which one call
    does in a third to a half of the time that copying into a view of each takes.

    Args:
        flat: Shape (sum of numels,).
        shapes: Shapes of the tensors, in order.
    """

    def __init__(self, flat: Tensor, shapes: Sequence[Sequence[int]]) -> None:
        self._flat = flat
        self._shapes = [torch.Size(shape) for shape in shapes]
        rows = {(len(shape), shape[1:]) for shape in self._shapes}
        self._joined: Tensor | None = None
        if len(rows) == 1 and len(self._shapes[0]) > 0:
            num_rows = sum(shape[0] for shape in self._shapes)
            self._joined = flat.view(num_rows, *self._shapes[0][1:])

    @cached_property
    def views(self) -> list[Tensor]:
        """The segments, each in its tensor's shape."""
        segments = torch.split_with_sizes(self._flat, [shape.numel() for shape in self._shapes])
        return [segment.view(shape) for segment, shape in zip(segments, self._shapes, strict=True)]

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites all segments with dense `tensors` of their shapes, dtype and device; no gradient is recorded."""
        if self._joined is not None:
            torch.cat(list(tensors), out=self._joined)
        else:
            torch._foreach_copy_(self.views, list(tensors))


_SIZE = 200  # parameters; what torch keeps of them fits a second-level cache together
_gradient = attrgetter("grad")


class Block:
    """Some parameters and the memory that their gradients are copied to.

    Args:
        params: contiguous; where they lie now is where they must lie when gradients are copied.
        target: shape (sum of numels,).
    """

    def __init__(self, params: tuple[Tensor, ...], target: Tensor) -> None:
        self.params = params
        self._places = places(params)
        self._segments = Segments(target, [p.shape for p in params])

    def copy_(self, gradients: Sequence[Tensor] | None) -> bool:
        """Copies `gradients`, or each parameter's `.grad`; returns whether the parameters are where they were."""
        if places(self.params) != self._places:
            return False
        self._segments.copy_(list(map(_gradient, self.params) if gradients is None else gradients))
        return True


def blocks_of(params: tuple[Tensor, ...], buffer: Tensor) -> list[Block]:
    """Returns the blocks of `params`, whose gradients fill the 1-D `buffer` in their order."""
    ends = list(accumulate((p.numel() for p in params), initial=0))
    starts = range(0, len(params), _SIZE)
    return [Block(params[i : i + _SIZE], buffer[ends[i] : ends[min(i + _SIZE, len(params))]]) for i in starts]


# Gradients of many parameters side by side in one buffer.


@dataclass(slots=True, eq=False)
class FlatGradients:
    """Gradients of several dense parameters of one dtype and device side by side in one 1-D buffer.

    Attributes:
        names: parameter-store names, one per parameter.
        params: the unconstrained leaf tensors, in the order of `names`.
        buffer: shape (sum of numels,), dtype of the parameters; the gradients in that order, each in row-major order.
            Whoever receives it may overwrite it.

    The steady state is recognised by the identity of the `params` tuple: hand over the same tuple object each step.
    """

    names: tuple[str, ...]
    params: tuple[Tensor, ...]
    buffer: Tensor

    def offsets(self) -> list[int]:
        """Returns where each gradient starts in `buffer`, and at last where the last one ends."""
        return list(accumulate((p.numel() for p in self.params), initial=0))


def copy_into(buffer: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int] | None = None) -> None:
    """Copies dense `tensors` one behind the other into the 1-D `buffer`, whose length is the sum of theirs."""
    if all(t.dim() == 1 for t in tensors):
        torch.cat(list(tensors), out=buffer)
        return
    start = 0
    for t in tensors:
        end = start + t.numel()
        buffer[start:end].view(t.shape).copy_(t)
        start = end


def pack(named: Sequence[tuple[str, Tensor]], buffer: Tensor | None = None) -> FlatGradients:
    """Copies the gradients of `named` into one buffer, in the given order.

    Args:
        named: (name, parameter) pairs of one dtype and device, each with a dense gradient.
        buffer: shape (sum of numels,), overwritten when given; a new one otherwise.

    Returns:
        The packed gradients.

    Raises:
        ValueError: when a parameter has no gradient, a sparse one, or another dtype or device than the first.

    Example:
        >>> x, y = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
        >>> (x.sum() + 3 * y).backward()
        >>> pack([("x", x), ("y", y)]).buffer
        tensor([1., 1., 3.])
    """
    if not named:
        raise ValueError("pack: no parameters given, expected at least one (name, parameter) pair.")
    first = named[0][1]
    for name, p in named:
        if p.grad is None or p.grad.layout is not torch.strided:
            found = "no gradient" if p.grad is None else f"a gradient of layout {p.grad.layout}"
            raise ValueError(f"pack: parameter {name!r} has {found}, expected a dense one; pass it as loose instead.")
        if p.dtype != first.dtype or p.device != first.device:
            raise ValueError(
                f"pack: parameter {name!r} is {p.dtype} on {p.device}, {named[0][0]!r} is {first.dtype} on "
                f"{first.device}; pack each dtype and device by itself."
            )
    params = tuple(p for _, p in named)
    if buffer is None:
        buffer = first.new_empty(sum(p.numel() for p in params), requires_grad=False)
    with torch.no_grad():
        copy_into(buffer, [p.grad for p in params if p.grad is not None])
    return FlatGradients(tuple(name for name, _ in named), params, buffer)

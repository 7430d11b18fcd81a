"""How compiled steps compute what torch's compiler, or the library that it calls, computes slowly on a CPU.

Each is the same function, rounded otherwise: a compiled step is held to eager's own error, not to its bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distopt.infer.capture.recording import aten

MAX_NARROW = 8
"""Columns of a product up to which MKL's usual way is slow where the second matrix lies row by row. Products of 2
columns took 2 to 40 times as long as with that matrix column by column, products of 16 as long."""

_NUM_TERMS = 7
"""Terms of the series of `_log1p_of_fraction`. The next one is 1.4e-8 of the result at most, a quarter of what float32
rounds."""

_EXACT_THRESHOLD = 17.0
"""Beyond it softplus is its argument in float32: exp(-17) is less than half of the last bit of 17."""

TEXT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""A hash of this module's text, on which the bits of compiled steps depend."""

# The compiler's cache knows an operator by its name and not what it is lowered to.
_NAME = f"store_{TEXT[:12]}"
_library = torch.library.Library("distopt", "FRAGMENT")  # type: ignore[no-untyped-call]
if not hasattr(torch.ops.distopt, _NAME):  # by an earlier import of this module
    _library.define(f"{_NAME}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(_NAME, Tensor.clone, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"distopt::{_NAME}", Tensor.clone, lib=_library)

STORE = getattr(torch.ops.distopt, _NAME).default
"""A copy of a tensor that the compiler stores: otherwise each loop that reads the tensor may compute it again."""


def lower_store() -> None:
    """Tells the compiler what `STORE` is."""
    from torch._inductor.ir import ExternKernel
    from torch._inductor.lowering import lowerings, register_lowering

    # New memory, even where the tensor has its own: the compiler may let a later operation write to it.
    def store(x: Any) -> Any:
        return ExternKernel.copy_input(x)

    if STORE not in lowerings:
        register_lowering(STORE, type_promotion_kind=None)(store)


class Table(dict[Any, Callable[..., Any]]):
    """The compiler's own decompositions with those of this module in their place.

    The compiler's caches take it into their keys, by pickling: as this module with its text, and not as all functions.

    Args:
        _text: A hash of the module's text; taken, and not used, when it is unpickled.
    """

    def __init__(self, _text: str = "") -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__(select_decomp_table())
        for operator, function in _DECOMPOSITIONS.items():
            self[operator] = _or_else(function, self.get(operator))

    def __reduce__(self) -> tuple[type[Table], tuple[str]]:
        """Returns how it is made."""
        return Table, (TEXT,)


def _or_else(function: Callable[..., Any], otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
    """Returns a decomposition that asks another one where the first has none."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return otherwise(*args, **kwargs) if result is NotImplemented and otherwise is not None else result

    return decompose


def _mm(a: Tensor, b: Tensor) -> Any:
    """A product of few columns, with its second matrix column by column."""
    is_for_mkl = a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64)
    is_narrow = is_for_mkl and 2 <= b.shape[1] <= MAX_NARROW < a.shape[0] and a.shape[1] > 1
    if not is_narrow or b.stride(1) != 1 or b.stride(0) == 1:
        return NotImplemented
    if a.stride(1) == 1:
        return torch.mm(a, b.t().clone(memory_format=torch.contiguous_format).t())
    return torch.mm(b.t(), a.t()).t().contiguous()  # rows side by side, as later views take for granted


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """max(x, 0) + log(1 + exp(-|x|))."""
    if not _is_float32(x) or threshold < _EXACT_THRESHOLD or beta <= 0.0:
        return NotImplemented
    scaled = x * beta
    return (scaled.clamp_min(0.0) + _log1p_of_fraction(torch.exp(-scaled.abs()))) / beta


def _log_sigmoid_forward(x: Tensor) -> Any:
    """min(x, 0) - log(1 + exp(-|x|)), and the power, which its gradient uses."""
    if not _is_float32(x):
        return NotImplemented
    power = torch.exp(-x.abs())
    return x.clamp_max(0.0) - _log1p_of_fraction(power), power


def _is_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _log1p_of_fraction(x: Tensor) -> Tensor:
    """Returns log(1 + x) of numbers between 0 and 1, in float32.

    With s = x / (2 + x), which is at most 1/3, it is 2 artanh(s) = 2 s (1 + s^2 / 3 + s^4 / 5 + ...). That is a
    division and some products, where the library's logarithm is right for all numbers and takes longer.
    """
    s = x / (x + 2.0)
    square, twice = s * s, s + s
    series = square * (1.0 / (2 * _NUM_TERMS - 1)) + 1.0 / (2 * _NUM_TERMS - 3)
    for term in reversed(range(1, _NUM_TERMS - 2)):
        series = series * square + 1.0 / (2 * term + 1)
    return twice + twice * square * series  # the first term last, with the least rounding


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.softplus.default: _softplus,
    aten.log_sigmoid_forward.default: _log_sigmoid_forward,
}

"""Which operations a program computes itself, without torch's dispatcher, allocator and iterators.

That is arithmetic that IEEE 754 rounds exactly, on CPU tensors of float32 and float64 with at most `MAX_ELEMENTS`: a
sum of three or more elements depends on their order and stays ATen's, as do exp, log, products of matrices and random
numbers. Vectors of any size are indexed here too, and summed up at indices, in the order that ATen has on one thread.
The list is closed, and tests/infer/capture/test_direct.py compares each of its operations with ATen's for bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.infer.capture.recording import Op, Recording, Slot, TensorInfo, aten

MAX_ELEMENTS = 2048
"""Above this ATen's vectorized loops outweigh what they cost to call (measured: 1.16 x on 1.6 million elements)."""

MAX_INDEXED = 1 << 22
"""Vectors that are indexed may be as large as this; each result keeps its memory from step to step."""

_MAX_EXACT_INT = 1 << 24  # integers up to here are exact in float32

_BINARY = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.rsub.Scalar: "rsub",
    aten.rsub.Tensor: "rsub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
}
_UNARY = {
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.clone.default: "copy",
}
_COMPARISONS = {
    getattr(getattr(aten, name), overload): name
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for overload in ("Tensor", "Scalar")
}
_FLOATS = (torch.float32, torch.float64)
_CAST_FROM = (torch.float32, torch.float64, torch.bool, torch.int64)

SCALAR, CONTIGUOUS, STRIDED = range(3)


class Operand(NamedTuple):
    """An operand, and where each of its elements lies in the order of the result's."""

    value: Slot | Tensor
    layout: int
    offsets: list[int]


class DirectOp(NamedTuple):
    """An operation of the C++ loop.

    Attributes:
        name: Its name there.
        dtype: The type of its operands.
        operands: What it reads.
        extent: For `gather` the elements of the table, for `scatter_add` the number of values, else 0.
    """

    name: str
    dtype: torch.dtype
    operands: list[Operand]
    extent: int = 0


def direct_op(op: Op, recording: Recording) -> DirectOp | None:
    """Returns how the C++ loop computes an operation, None where ATen must."""
    if op.is_host or op.writes or len(op.outs) != 1 or op.outs[0] < 0:
        return None
    out = recording.infos[op.outs[0]]
    size = math.prod(out.shape)
    if op.function in (aten.index.Tensor, aten.index_put.default):
        return _indexed(op, recording, out)

    # Results are written one after the other into a buffer that stays, so they must lie in memory that way.
    if out.device.type != "cpu" or not 0 < size <= MAX_ELEMENTS or not out.has_default_strides:
        return None
    if _sums_pairs(op, recording, out):
        return DirectOp("sum_pairs", out.dtype, [Operand(op.args[0], CONTIGUOUS, [])])
    named = named_operation(op, recording, out)
    if named is None:
        return None

    name, args, dtypes = named
    operands = []
    for argument, dtype in zip(args, dtypes, strict=True):
        operand = _operand(argument, dtype, recording, out)
        if operand is None:
            return None
        operands.append(operand)
    return DirectOp(name, dtypes[-1], operands)


def named_operation(op: Op, recording: Recording, out: TensorInfo) -> tuple[str, list[Any], list[torch.dtype]] | None:
    """Returns an operation's name in C++, its arguments, and the type that each must have; None if it is not exact.

    Args:
        op: It has one result and writes to nothing.
        recording: Its recording.
        out: What its result looks like.
    """
    # Types must agree but for Python numbers, which torch casts to the tensors' type before it computes, as done here.
    function, args = op.function, op.args
    floating = out.dtype in _FLOATS
    if function in _BINARY and floating:
        rest = [*args[2:], *op.kwargs.values()]  # alpha
        plain = all(type(value) is int and value == 1 for value in rest) and set(op.kwargs) <= {"alpha"}
        return (_BINARY[function], args[:2], [out.dtype] * 2) if plain else None
    if function in _UNARY and floating and (not op.kwargs or function is aten.clone.default):
        return _UNARY[function], args[:1], [out.dtype]
    if function is aten.pow.Tensor_Scalar and floating and type(args[1]) in (int, float) and args[1] in (1, 2):
        return ("square" if args[1] == 2 else "copy"), args[:1], [out.dtype]

    if function in _COMPARISONS and out.dtype == torch.bool and not op.kwargs:
        dtypes = {recording.infos[slot].dtype for slot in op.ins}
        if len(dtypes) == 1 and (dtype := dtypes.pop()) in _FLOATS and isinstance(args[0], Slot):
            return _COMPARISONS[function], args[:2], [dtype] * 2

    if function is aten.where.self and floating:
        return "where", args, [torch.bool, out.dtype, out.dtype]
    return _cast_or_sum(op, recording, out) if floating else None


def _sums_pairs(op: Op, recording: Recording, out: TensorInfo) -> bool:
    """Returns whether an operation sums the two elements of each row, along the last dimension."""
    if op.function is not aten.sum.dim_IntList or op.kwargs or out.dtype not in _FLOATS:
        return False
    source = recording.infos[op.args[0].index]
    is_last = op.args[1] in ([-1], [len(source.shape) - 1])
    return is_last and source.shape[-1:] == (2,) and source.dtype == out.dtype and is_contiguous(source)


def _indexed(op: Op, recording: Recording, out: TensorInfo) -> DirectOp | None:
    """Returns how a vector is indexed by a vector of integers, or sums up at such indices."""
    table, indices, *rest = op.args
    simple = isinstance(table, Slot) and len(indices) == 1 and isinstance(indices[0], Slot) and not op.kwargs
    if not simple or out.dtype not in _FLOATS or not 0 < math.prod(out.shape) <= MAX_INDEXED:
        return None

    tensors = [recording.infos[slot.index] for slot in (table, indices[0], *rest[:1])]
    vectors = all(len(each.shape) == 1 and is_contiguous(each) for each in (*tensors, out))
    floats = {each.dtype for each in (tensors[0], *tensors[2:])} == {out.dtype}
    if not (vectors and floats and tensors[1].dtype == torch.int64 and 0 not in tensors[1].shape + tensors[0].shape):
        return None

    operands = [Operand(slot, CONTIGUOUS, []) for slot in (table, indices[0], *rest[:1])]
    if op.function is aten.index.Tensor:
        return DirectOp("gather", out.dtype, operands, tensors[0].shape[0])
    summed = rest[1:] == [True] and tensors[2].shape == tensors[1].shape
    return DirectOp("scatter_add", out.dtype, operands, tensors[2].shape[0]) if summed else None


def _cast_or_sum(op: Op, recording: Recording, out: TensorInfo) -> tuple[str, list[Any], list[torch.dtype]] | None:
    source = recording.infos[op.args[0].index] if op.args and isinstance(op.args[0], Slot) else None
    if source is None:
        return None
    if op.function is aten._to_copy.default and set(op.kwargs) <= {"dtype"} and source.dtype in _CAST_FROM:
        return "copy", op.args, [source.dtype]
    one = math.prod(source.shape) == 1 and source.dtype == out.dtype
    if op.function in (aten.sum.default, aten.sum.dim_IntList) and one and not set(op.kwargs) - {"dtype"}:
        if op.kwargs.get("dtype", out.dtype) in (out.dtype, None):
            return "sum", op.args[:1], [out.dtype]
    return None


def _operand(argument: Any, dtype: torch.dtype, recording: Recording, out: TensorInfo) -> Operand | None:
    if not isinstance(argument, Slot):
        number = exact_number(argument, dtype)
        return None if number is None else Operand(number, SCALAR, [])
    info = recording.infos[argument.index]
    if info.dtype != dtype or info.device.type != "cpu":
        return None
    if math.prod(info.shape) == 1:
        return Operand(argument, SCALAR, [])
    if info.shape == out.shape and is_contiguous(info):
        return Operand(argument, CONTIGUOUS, [])
    return Operand(argument, STRIDED, _offsets(info, out.shape))


def exact_number(value: Any, dtype: torch.dtype) -> Tensor | None:
    """Returns a number as torch casts it, (1,) of `dtype`; None for what is no number or an integer that is rounded."""
    exact_int = type(value) is int and abs(value) <= _MAX_EXACT_INT
    return torch.tensor([value], dtype=dtype) if type(value) is float or exact_int else None


def _offsets(info: TensorInfo, shape: tuple[int, ...]) -> list[int]:
    """Returns the distance of each element of the operand, broadcast to `shape`, from its first one."""
    strides = torch.empty_strided(info.shape, info.stride, device="meta").expand(shape).stride()
    offsets = torch.zeros(shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        offsets += (torch.arange(size) * stride).view([-1] + [1] * (len(shape) - dim - 1))
    return offsets.reshape(-1).tolist()


def is_contiguous(info: TensorInfo) -> bool:
    """Returns whether a tensor's elements lie one after the other, in their order."""
    expected = 1
    for size, stride in zip(reversed(info.shape), reversed(info.stride), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

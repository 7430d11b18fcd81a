"""Matrix products with few columns, computed as their transposes where that is quicker and has the same bits.

MKL takes up to 20 times as long for a product of many rows and two or three columns as for its transpose (4096 x 64 by
64 x 2: 1.0 ms and 0.04 ms). Both sum in the same order for some shapes and strides and in another one for others, as
its kernels have it on this machine: a trial with random numbers tells, at many addresses of the operands, since kernels
may differ with these too. What it tells holds for as many threads as there are.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from distopt.infer.capture.passes import new_slot
from distopt.infer.capture.recording import Op, Recording, Slot, TensorInfo, aten, same_bits

COLUMNS = (2, 3)
"""Other numbers of columns gain little, or have other bits in most shapes."""

MIN_SIZE = 64
"""Smaller matrices have nothing to gain: their transposes take longer than the product."""

_MAX_NUMBERS = 1 << 22  # from an operand's first to its last: a trial of larger ones would take long
_NUM_TRIALS = 16
_ADDRESSES = 16  # at which an operand begins, one number after the other: of float32 they cover a line of the cache


def turn_products(recording: Recording) -> Recording:
    """Returns an equal recording, with the products turned around that gain by it on the CPU and keep their bits."""
    turned = copy.copy(recording)
    turned.infos = [*recording.infos]
    turned.alias = [*recording.alias]
    turned.ops = []
    for op in recording.ops:
        turned.ops += _turned(op, turned) if _gains(op, turned) else [op]
    return turned


def _gains(op: Op, recording: Recording) -> bool:
    if op.function is not aten.mm.default:
        return False
    rows, columns = (recording.infos[slot] for slot in op.ins)
    out = recording.infos[op.outs[0]]
    return (
        out.device.type == "cpu"
        and out.dtype in (torch.float32, torch.float64)
        and out.has_default_strides
        and out.shape[1] in COLUMNS
        and min(rows.shape) >= MIN_SIZE
        and max(_extent(rows), _extent(columns)) <= _MAX_NUMBERS
        and not (rows.is_conj or rows.is_neg or columns.is_conj or columns.is_neg)
        and _has_same_bits(rows, columns, torch.get_num_threads())
    )


@functools.cache
def _has_same_bits(rows: TensorInfo, columns: TensorInfo, num_threads: int) -> bool:
    """Returns whether both products of random matrices of such shapes and strides are equal in every bit."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(_NUM_TRIALS):
        a = _random(rows, trial, generator)
        b = _random(columns, trial // 2 * 5 % _ADDRESSES, generator)
        if not same_bits(a @ b, (b.t() @ a.t()).t().contiguous()):
            return False
    return True


def _extent(info: TensorInfo) -> int:
    """Returns the number of elements that memory has from a tensor's first one to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.stride, strict=True))


def _random(info: TensorInfo, offset: int, generator: torch.Generator) -> Tensor:
    """Returns random numbers that lie as a recorded tensor does, from an address that many numbers further on."""
    memory = torch.empty(_extent(info) + offset, dtype=info.dtype, device="cpu").normal_(generator=generator)
    return memory.as_strided(info.shape, info.stride, offset)


def _turned(op: Op, recording: Recording) -> list[Op]:
    """Returns operations that compute the transpose of a product, and turn it."""
    left, right = op.ins
    (out,) = op.outs
    columns, rows = _transpose(recording, right, op), _transpose(recording, left, op)
    ins = [*columns.outs, *rows.outs]
    info = recording.infos[out]
    product = new_slot(recording, info._replace(shape=info.shape[::-1], stride=(info.shape[0], 1)))
    multiply = Op(aten.mm.default, [*map(Slot, ins)], {}, [product], ins, [], op.line)
    back = _transpose(recording, product, op)
    layout = {"memory_format": torch.contiguous_format}
    return [
        *(columns, rows, multiply, back),
        Op(aten.clone.default, [Slot(back.outs[0])], layout, [out], [*back.outs], [], op.line),
    ]


def _transpose(recording: Recording, slot: int, op: Op) -> Op:
    info = recording.infos[slot]
    turned = info._replace(shape=info.shape[::-1], stride=info.stride[::-1])
    out = new_slot(recording, turned, recording.alias[slot])
    return Op(aten.t.default, [Slot(slot)], {}, [out], [slot], [], op.line)

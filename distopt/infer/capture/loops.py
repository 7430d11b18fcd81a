"""Which operations on large tensors a program computes together, in one loop over blocks.

A step's arithmetic on many rows is dozens of operations, each of which reads its operands from memory and writes its
result to it. Those that IEEE 754 rounds exactly, whoever computes them, have the same bits in a loop that takes a block
of 1,024 elements through all of them: what lies between stays in a core's cache. Sums, exp, log and the like are
ATen's, and end a loop: it computes what they need, and the rest waits for others to join.

An operation may wait, since neither its operands nor its result are ever written to in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.infer.capture.direct import MAX_ELEMENTS, exact_number, named_operation
from distopt.infer.capture.recording import Op, Recording, Slot, TensorInfo

BLOCK_SIZE = 1024
"""Elements of a block, as in _loops.h."""

_NAMES = frozenset({"add", "sub", "rsub", "mul", "div", "neg", "square", "copy", "reciprocal"})

MAX_HELD = (16, 8, 4, 2, 0)
"""Results that waiting operations may keep, of which the first is taken that needs no more memory."""

MOST_MEMORY = 1.1
"""Times the memory of one operation after the other."""

# Where an operand comes from, as in _loops.h.
SLOT, FIXED, TEMPORARY, OUTPUT = range(4)


class LoopOperand(NamedTuple):
    """What an operation of a loop reads.

    Attributes:
        value: A slot, or a number as a tensor.
        is_scalar: Whether it is one number for all elements.
        period: Elements after which it begins anew; 0: it has as many as the result.
    """

    value: Slot | Tensor
    is_scalar: bool
    period: int


class LoopOp(NamedTuple):
    """An operation of a loop: its name in C++, its operands and the operation itself."""

    name: str
    operands: list[LoopOperand]
    op: Op

    @property
    def out(self) -> int:
        """Returns the slot of its result."""
        return self.op.outs[0]


@dataclass
class Loop:
    """Operations that are computed block by block; `outs` are the slots of their results that others read."""

    ops: list[LoopOp]
    outs: list[int] = field(default_factory=list)


def with_loops(recording: Recording) -> list[Op | Loop]:
    """Returns the operations of a recording in an order that computes the same, some of them in loops.

    What waits keeps its operands, so that as much may wait as takes no more memory than one operation after the other.
    """
    most = MOST_MEMORY * _peak(recording.ops, recording)
    for max_held in MAX_HELD:
        items = _with_loops(recording, max_held)
        if _peak(items, recording) <= most:
            return items
    return list(recording.ops)


def _with_loops(recording: Recording, max_held: int) -> list[Op | Loop]:
    """As `with_loops`, where operations that wait may keep `max_held` large results of others."""
    written = recording.written()
    items: list[Op | Loop] = []
    waiting: dict[Any, list[LoopOp]] = {}  # by number of elements and type of their results
    held: dict[Any, set[int]] = {}  # likewise, the large operands that nothing else may need any more
    keys: dict[int, Any] = {}  # by the slot of such a result: under which key its operation waits
    kept = {*range(recording.num_inputs), *recording.lifted, *recording.foreign}

    def emit(taken: list[LoopOp]) -> None:
        items.append(Loop(taken))
        for each in taken:
            del keys[each.out]

    def operands(each: LoopOp) -> set[int]:
        slots = {slot for slot in each.op.ins if slot not in keys and slot not in kept}
        return {slot for slot in slots if math.prod(recording.infos[slot].shape) > MAX_ELEMENTS}

    for op in recording.ops:
        loop_op = _loop_op(op, recording, written)
        if loop_op is None:
            for slot in op.ins:
                if slot in keys:
                    key = keys[slot]
                    emit(_take(waiting[key], slot))
                    held[key] = set().union(*map(operands, waiting[key]))
            items.append(op)
            continue
        info = recording.infos[loop_op.out]
        key = keys[loop_op.out] = math.prod(info.shape), info.dtype
        waiting.setdefault(key, []).append(loop_op)
        held.setdefault(key, set()).update(operands(loop_op))
        if len(held[key]) > max_held:
            emit(waiting.pop(key))
            del held[key]
    for ops in waiting.values():
        if ops:
            emit(ops)
    return _with_outputs(items, recording)


def _peak(items: Sequence[Op | Loop], recording: Recording) -> int:
    """Returns the most bytes of results that there are at once, where each is let go of after its last reader."""
    last: dict[int, int] = {}
    for position, item in enumerate(items):
        for slot in _slots(item):
            last[recording.alias[slot]] = position
    for slot in recording.outputs():
        last[recording.alias[slot]] = len(items)

    sizes: dict[int, int] = {}
    now = peak = 0
    ends: dict[int, list[int]] = {}
    for memory, position in last.items():
        ends.setdefault(position, []).append(memory)
    for position, item in enumerate(items):
        for slot in item.outs:
            memory = recording.alias[slot] if slot >= 0 else -1
            if memory == slot and slot not in sizes:
                info = recording.infos[slot]
                sizes[slot] = math.prod(info.shape) * info.dtype.itemsize
                now += sizes[slot]
        peak = max(peak, now)
        now -= sum(sizes.get(memory, 0) for memory in ends.get(position, ()))
    return peak


def _slots(item: Op | Loop) -> list[int]:
    """Returns the slots that an operation, or a loop, reads and writes."""
    read = item.ins if isinstance(item, Op) else [slot for each in item.ops for slot in each.op.ins]
    return [slot for slot in (*read, *item.outs) if slot >= 0]


def _take(waiting: list[LoopOp], slot: int) -> list[LoopOp]:
    """Takes out, in their order, the operations that the result `slot` needs."""
    needed = {slot}
    taken = []
    for each in reversed(waiting):
        if each.out in needed:
            needed.update(each.op.ins)
            taken.append(each)
    waiting[:] = [each for each in waiting if each.out not in needed]
    return taken[::-1]


def _with_outputs(items: list[Op | Loop], recording: Recording) -> list[Op | Loop]:
    """Finds out which results of loops others read; a loop of a single operation is left to ATen."""
    readers: dict[int, set[int]] = {}
    for position, item in enumerate(items):
        for slot in item.ins if isinstance(item, Op) else [slot for each in item.ops for slot in each.op.ins]:
            readers.setdefault(slot, set()).add(position)
    outputs = set(recording.outputs())

    result: list[Op | Loop] = []
    for position, item in enumerate(items):
        if isinstance(item, Loop) and len(item.ops) > 1:
            outs = [each.out for each in item.ops]
            item.outs = [out for out in outs if out in outputs or readers.get(out, set()) - {position}]
            result.append(item)
        else:
            result.append(item.ops[0].op if isinstance(item, Loop) else item)
    return result


def _loop_op(op: Op, recording: Recording, written: set[int]) -> LoopOp | None:
    """Returns an operation as one of a loop; None where it cannot be one."""
    if op.is_host or op.writes or len(op.outs) != 1 or op.outs[0] < 0:
        return None
    out = recording.infos[op.outs[0]]
    if out.device.type != "cpu" or math.prod(out.shape) <= MAX_ELEMENTS or not out.has_default_strides:
        return None
    if any(recording.alias[slot] in written for slot in (*op.ins, *op.outs)):
        return None
    named = named_operation(op, recording, out)
    if named is None or named[0] not in _NAMES or set(named[2]) != {out.dtype}:
        return None
    operands = [_operand(argument, recording, out) for argument in named[1]]
    if None in operands or all(each.is_scalar for each in operands if each):
        return None
    return LoopOp(named[0], [each for each in operands if each], op)


def _operand(argument: Any, recording: Recording, out: TensorInfo) -> LoopOperand | None:
    if not isinstance(argument, Slot):
        number = exact_number(argument, out.dtype)
        return None if number is None else LoopOperand(number, is_scalar=True, period=0)
    info = recording.infos[argument.index]
    if info.dtype != out.dtype or info.device.type != "cpu" or info.is_conj or info.is_neg:
        return None
    period = _period(info, out.shape)
    if period is None:
        return None
    return LoopOperand(argument, is_scalar=period == 1, period=0 if period in (1, math.prod(out.shape)) else period)


def _period(info: TensorInfo, shape: tuple[int, ...]) -> int | None:
    """Returns the number of elements after which an operand begins anew; None if it lies in memory in another way."""
    strides = torch.empty_strided(info.shape, info.stride, device="meta").expand(shape).stride()
    period = 1
    dims = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    while dims and dims[-1][1] == period:
        period *= dims.pop()[0]
    repeated = all(stride == 0 for _, stride in dims)
    fits = not dims or (period <= BLOCK_SIZE and BLOCK_SIZE % period == 0)
    return period if repeated and fits else None


class LoweredLoop(NamedTuple):
    """A loop as C++ takes it, with its results in memory of a block where nobody else reads them.

    Attributes:
        operations: (name, operands, whether it writes an output, which output or temporary it writes) of each, where an
            operand is (source, slot or temporary or output, fixed tensor, whether it is one number, period).
        num_temporaries: How many there are at once.
    """

    operations: list[tuple[str, list[tuple[int, int, Tensor | None, bool, int]], bool, int]]
    num_temporaries: int


def lowered(loop: Loop, fixed: dict[int, Tensor]) -> LoweredLoop:
    """Gives the results of a loop their memory.

    Args:
        loop: The loop.
        fixed: By slot, tensors that stay where they are.
    """
    last = {slot: position for position, each in enumerate(loop.ops) for slot in each.op.ins}
    outputs = {slot: index for index, slot in enumerate(loop.outs)}
    temporaries: dict[int, int] = {}
    free: list[int] = []
    num_temporaries = 0
    operations = []
    for position, each in enumerate(loop.ops):
        operands = [_lowered_operand(operand, outputs, temporaries, fixed) for operand in each.operands]
        # What is read for the last time makes room for the result, element by element.
        free += [temporaries.pop(slot) for slot in {*each.op.ins} & temporaries.keys() if last[slot] == position]
        if each.out in outputs:
            index = outputs[each.out]
        else:
            if not free:
                free.append(num_temporaries)
                num_temporaries += 1
            index = temporaries[each.out] = free.pop()
        operations.append((each.name, operands, each.out in outputs, index))
    return LoweredLoop(operations, num_temporaries)


def _lowered_operand(
    operand: LoopOperand, outputs: dict[int, int], temporaries: dict[int, int], fixed: dict[int, Tensor]
) -> tuple[int, int, Tensor | None, bool, int]:
    how = operand.is_scalar, operand.period
    if isinstance(operand.value, Tensor):
        return FIXED, -1, operand.value, *how
    slot = operand.value.index
    if slot in temporaries:
        return TEMPORARY, temporaries[slot], None, *how
    if slot in outputs:
        return OUTPUT, outputs[slot], None, *how
    return (FIXED, -1, fixed[slot], *how) if slot in fixed else (SLOT, slot, None, *how)

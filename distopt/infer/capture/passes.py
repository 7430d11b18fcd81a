"""Shortens a recorded step without changing a bit of what it computes.

Each pass takes time linear in the number of operations. None of them reorders draws from a generator, host calls or
writes in place, and each can be left out, which the tests use to compare them one by one.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from distopt.infer.capture.recording import (
    Argument,
    Op,
    Recording,
    Slot,
    TensorInfo,
    aten,
    packed_bytes,
    same_bits,
    slots_in,
    substitute,
)

MAX_FOLDED_BYTES = 1 << 16
"""Results of constants are kept up to this size each: larger ones are computed anew, for memory costs more."""

MAX_COMPARED_FOLD_BYTES = 1 << 10
"""Foreign tensors up to this size count as constants: they are compared with their recorded values at each step."""

_SAME_VALUE = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_VIEWS = frozenset(
    {
        aten.view.default,
        aten.expand.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.permute.default,
    }
)
# Their results depend on what their argument looks like, and on none of its values.
_VALUE_FREE = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
    }
)
_COPIES = frozenset({aten._to_copy.default, aten.clone.default})


def shorten(recording: Recording, passes: Iterable[str] | None = None) -> Recording:
    """Returns an equal recording with fewer operations; `passes` names those of `PASSES` to apply, all by default."""
    short = copy.copy(recording)
    short.ops = [
        Op(each.function, each.args, each.kwargs, each.outs, each.ins, each.writes, each.line) for each in recording.ops
    ]
    short.infos = list(recording.infos)
    short.alias = list(recording.alias)
    short.lifted = dict(recording.lifted)
    short.compared = dict(recording.compared)
    short.grads = list(recording.grads)
    short.accumulated = {}
    keep_lifted_writable(short)
    for name in PASSES if passes is None else passes:
        PASSES[name](short)
    remove_unused_constants(short)
    return short


def keep_lifted_writable(recording: Recording) -> None:
    """Copies constants that the step writes to before it does, since each step starts from their first values."""
    written = recording.written()
    for op in recording.ops:
        if op.function is aten.lift_fresh.default and recording.alias[op.outs[0]] in written:
            (source,) = op.ins
            if source in recording.lifted:
                op.function = aten.clone.default
                op.args = [Slot(source)]
                _split_alias(recording, source)


def _split_alias(recording: Recording, source: int) -> None:
    """Moves everything that shares the memory of `source` to the memory of the copy that is now made of it."""
    shared = recording.alias[source]
    others = [slot for slot, alias in enumerate(recording.alias) if alias == shared and slot != source]
    for slot in others:
        recording.alias[slot] = others[0]
    recording.alias[source] = source


def remove_dead(recording: Recording) -> None:
    """Drops operations that no output depends on.

    Draws stay, since the generator's state is a result of the step, and so do host calls and writes to memory that
    existed before the step.
    """
    alias = recording.alias
    live = set(recording.outputs())
    live_memory = {alias[slot] for slot in live}
    outside = {alias[slot] for slot in (*range(recording.num_inputs), *recording.foreign)}
    kept: list[Op] = []

    for op in reversed(recording.ops):
        written = {alias[slot] for slot in op.writes}
        needed = (
            op.is_host
            or op.is_random
            or all(slot < 0 for slot in op.outs)  # it only checks its arguments, as linear algebra does for errors
            or any(slot in live for slot in op.outs)
            or not written.isdisjoint(live_memory)
            or not written.isdisjoint(outside)
        )
        if needed:
            kept.append(op)
            used = [slot for slot in (*op.ins, *op.outs) if slot >= 0]
            live.update(used)
            live_memory.update(alias[slot] for slot in used)
    recording.ops = kept[::-1]


def accumulate_at_end(recording: Recording) -> None:
    """Takes the addition to a gradient that was there out of the list, where it is the only operation on it.

    Autograd adds each parameter's gradient once per backward pass. The program adds it when all checks have held, so
    that a step that fails has changed nothing.
    """
    uses: dict[int, list[Op]] = {}
    for op in recording.ops:
        for slot in (*op.ins, *op.outs):
            if recording.num_params <= slot < recording.num_inputs:
                uses.setdefault(slot, []).append(op)

    shared = Counter(recording.alias)
    removed: set[int] = set()
    for position, index in enumerate(recording.with_grad):
        slot = recording.num_params + position
        ops = {id(op): op for op in uses.get(slot, ())}
        if len(ops) != 1 or recording.grads[index] != slot or shared[slot] != 1:
            continue
        ((key, op),) = ops.items()
        value = op.args[1] if len(op.args) > 1 else None
        if op.function is not aten.add_.Tensor or op.kwargs or len(op.args) != 2 or not isinstance(value, Slot):
            continue

        like, grad = recording.infos[value.index], recording.infos[slot]
        if (like.shape, like.dtype) == (grad.shape, grad.dtype) and value.index != slot:
            recording.accumulated[index] = value.index
            recording.grads[index] = -1
            removed.add(key)
    recording.ops = [op for op in recording.ops if id(op) not in removed]


def drop_identities(recording: Recording) -> None:
    """Drops detached tensors, views of the whole, matrices that are turned twice, and copies that nobody writes to."""
    written = recording.written()
    replaced: dict[int, int] = {}
    turned: dict[int, int] = {}  # by the slot of a turned matrix: that of the matrix
    for op in recording.ops:
        _replace(op, replaced)
        if op.is_host or op.writes or not op.outs or not op.args or not isinstance(op.args[0], Slot):
            continue
        source, out = op.args[0].index, op.outs[0]
        if source == out or out < 0:
            continue

        # A copy may be dropped for what it copies only if neither is written to, now or through a view of it. A view
        # of the same shape and strides is the same memory anyhow.
        shared = recording.alias[source] == recording.alias[out]
        alike = recording.infos[source] == recording.infos[out]
        unwritten = not {recording.alias[source], recording.alias[out]} & written
        if op.function in _SAME_VALUE or (op.function in _VIEWS and shared and alike):
            replaced[out] = source
        elif op.function in _COPIES and alike and unwritten:
            replaced[out] = source
        elif op.function is aten.t.default and recording.infos[turned.get(source, out)] == recording.infos[out]:
            if source in turned:
                replaced[out] = turned[source]
            turned[out] = source

    _unite_memory(recording, replaced)
    recording.ops = [op for op in recording.ops if op.writes or not op.outs or op.outs[0] not in replaced]
    _replace_outputs(recording, replaced)


def _unite_memory(recording: Recording, replaced: dict[int, int]) -> None:
    """Gives the views of a dropped copy the memory of what was copied."""
    united = {out: recording.alias[source] for out, source in replaced.items() if recording.alias[out] == out}
    for slot, alias in enumerate(recording.alias):
        while alias in united:
            alias = united[alias]
        recording.alias[slot] = alias


def fold_constants(recording: Recording) -> None:
    """Computes once what depends on constants only.

    Constants are numbers, tensors made from numbers, and small tensors that existed before the step, whose bytes are
    compared before each captured step: a version counter would miss what NumPy or `.data` changes.
    """
    written = recording.written()
    known = {slot: t for slot, t in recording.lifted.items() if recording.alias[slot] not in written}
    comparable = {
        slot: tensor
        for slot, tensor in recording.foreign.items()
        if recording.alias[slot] not in written
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= MAX_COMPARED_FOLD_BYTES
    }

    # Each constant remembers the outside tensors that it was computed from: these are compared before each step.
    sources: dict[int, frozenset[int]] = {slot: frozenset() for slot in known}
    sources |= {slot: frozenset([slot]) for slot in comparable}
    known |= {slot: tensor.detach().clone() for slot, tensor in comparable.items()}

    kept: list[Op] = []
    for op in recording.ops:
        results: list[Tensor] = []
        if op.is_pure and -1 not in op.outs:
            if all(slot in known for slot in op.ins):
                results = _results(op, known)
            elif op.function in _VALUE_FREE and math.prod(recording.infos[op.outs[0]].shape) <= MAX_FOLDED_BYTES:
                results = _results(op, {slot: _empty(recording.infos[slot]) for slot in op.ins})

        # A copy of an expanded tensor lies in memory in another way, which later operations were not recorded for.
        looks = [TensorInfo.of(each) if isinstance(each, Tensor) else None for each in results]
        if (
            not results
            or looks != [recording.infos[out] for out in op.outs]
            or any(recording.alias[out] in written for out in op.outs)
            or _size(results) > MAX_FOLDED_BYTES
        ):
            kept.append(op)
            continue

        origin = frozenset().union(*(sources.get(slot, frozenset()) for slot in op.ins))
        for slot, tensor in zip(op.outs, results, strict=True):
            known[slot] = recording.lifted[slot] = tensor
            sources[slot] = origin
            recording.alias[slot] = slot
        for slot in origin:
            recording.compared.setdefault(slot, known[slot])
    recording.ops = kept


def _results(op: Op, known: dict[int, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        result = op.function(
            *(substitute(argument, known.__getitem__) for argument in op.args),
            **{name: substitute(argument, known.__getitem__) for name, argument in op.kwargs.items()},
        )
    return list(result) if isinstance(result, list | tuple) else [result]


def _empty(info: TensorInfo) -> Tensor:
    return torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=info.device)


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


# Functions of one element each, computed for all elements of a tensor. The first ones are rounded exactly by IEEE 754.
_EXACT = frozenset(
    {
        *(getattr(getattr(aten, name), kind) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")),
        aten.neg.default,
        aten.reciprocal.default,
    }
)
_ELEMENTWISE = {
    aten.digamma.default,
    aten.lgamma.default,
    aten.log.default,
    aten.log1p.default,
    aten.exp.default,
    aten.sqrt.default,
}


def _is_exact(op: Op) -> bool:
    rest = [*op.args[2:], *op.kwargs.values()]  # alpha, by which ATen multiplies and adds in one rounding or in two
    if not all(type(each) is int and each == 1 for each in rest):
        return False
    is_power = op.function is aten.pow.Tensor_Scalar and type(op.args[1]) in (int, float) and op.args[1] in (1, 2)
    return op.function in _EXACT or is_power


@functools.cache
def _ignores_size(function: Any, dtype: torch.dtype) -> bool:
    """Returns whether this machine computes the same bits for one number as for many equal ones, in a vector's loop."""
    values = torch.cat([torch.logspace(-30, 30, 40, dtype=dtype), torch.linspace(-9.9, 50.3, 300, dtype=dtype)])
    one = torch.stack([function(value) for value in values.unbind()])
    return all(same_bits(function(values[:, None].expand(-1, n).contiguous())[:, -1], one) for n in (2, 7, 16, 35))


def narrow_uniform(recording: Recording) -> None:
    """Computes once what is one number in many elements, such as a parameter or constant expanded to a batch's rows.

    Only what another kind of operation reads is written out for all elements.
    """
    written = recording.written()
    small = _expanded_constants(recording, written)  # by slot: the slot of its number, of shape ()
    absent: set[int] = set()  # those of them that are not written out
    kept: list[Op] = []
    outputs = set(recording.outputs())

    for op in recording.ops:
        if _is_expanded_number(op, recording, written):
            small[op.outs[0]] = op.ins[0]
        elif _is_uniform(op, recording, small, written) and op.outs[0] not in outputs:
            slot = new_slot(recording, TensorInfo((), recording.infos[op.outs[0]].dtype, (), op_device(op, recording)))
            args = [Slot(small.get(each.index, each.index)) if isinstance(each, Slot) else each for each in op.args]
            kept.append(Op(op.function, args, op.kwargs, [slot], [*slots_in(args)], [], op.line))
            small[op.outs[0]] = slot
            absent.add(op.outs[0])
            continue
        elif _is_exact(op):
            _broadcast_numbers(op, recording, small)

        for slot in dict.fromkeys(slot for slot in op.ins if slot in absent):
            kept += _written_out(recording, slot, small[slot], op.line)
            absent.discard(slot)
        kept.append(op)
    recording.ops = kept


def op_device(op: Op, recording: Recording) -> torch.device:
    """Returns the device of an operation's first result."""
    return recording.infos[op.outs[0]].device


def _expanded_constants(recording: Recording, written: set[int]) -> dict[int, int]:
    """Returns the constants that are one number expanded, and gives each number a slot of its own."""
    expanded = {
        slot: tensor
        for slot, tensor in recording.lifted.items()
        if tensor.numel() > 1
        and not any(tensor.stride())
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and recording.alias[slot] not in written
    }
    numbers: dict[int, int] = {}
    for slot, tensor in expanded.items():
        number = numbers[slot] = new_slot(recording, TensorInfo((), tensor.dtype, (), tensor.device))
        recording.lifted[number] = tensor.as_strided((), ()).clone()
    return numbers


def _is_expanded_number(op: Op, recording: Recording, written: set[int]) -> bool:
    return (
        op.function is aten.expand.default
        and op_device(op, recording).type == "cpu"  # where `_ignores_size` has looked
        and recording.infos[op.ins[0]].shape == ()
        and recording.infos[op.ins[0]].dtype in (torch.float32, torch.float64)
        and recording.alias[op.ins[0]] not in written
    )


def _is_uniform(op: Op, recording: Recording, small: dict[int, int], written: set[int]) -> bool:
    """Returns whether an operation computes one number for all elements of its result, from one number each."""
    if not (_is_exact(op) or op.function in _ELEMENTWISE) or not op.is_pure or op.kwargs:
        return False
    out = recording.infos[op.outs[0]]
    if math.prod(out.shape) < 2 or not out.has_default_strides or recording.alias[op.outs[0]] in written:
        return False
    numbers = all(slot in small or recording.infos[slot].shape == () for slot in op.ins)
    if not numbers or not any(slot in small for slot in op.ins):
        return False
    same_type = all(recording.infos[slot].dtype == out.dtype for slot in op.ins)
    unwritten = all(recording.alias[small.get(slot, slot)] not in written for slot in op.ins)
    return same_type and unwritten and (_is_exact(op) or _ignores_size(op.function, out.dtype))


def _broadcast_numbers(op: Op, recording: Recording, small: dict[int, int]) -> None:
    """Lets exact arithmetic read a number itself instead of its copies, where another operand gives the shape."""
    out = recording.infos[op.outs[0]]
    whole = [slot for slot in op.ins if slot not in small and recording.infos[slot] == out]
    if not whole:
        return
    op.args = [
        Slot(small[each.index])
        if isinstance(each, Slot) and recording.infos[each.index].dtype == out.dtype and each.index in small
        else each
        for each in op.args
    ]
    op.ins = [*slots_in(op.args)]


def _written_out(recording: Recording, slot: int, number: int, line: str) -> list[Op]:
    """Returns operations that write a number to all elements of `slot`."""
    info = recording.infos[slot]
    view = new_slot(recording, info._replace(stride=(0,) * len(info.shape)), recording.alias[number])
    expand = Op(aten.expand.default, [Slot(number), list(info.shape)], {}, [view], [number], [], line)
    layout = {"memory_format": torch.contiguous_format}
    return [expand, Op(aten.clone.default, [Slot(view)], layout, [slot], [view], [], line)]


def new_slot(recording: Recording, info: TensorInfo, alias: int | None = None) -> int:
    """Gives a result that no recorded operation had the next slot; `alias` is an earlier slot with the same memory."""
    slot = len(recording.infos)
    recording.infos.append(info)
    recording.alias.append(slot if alias is None else alias)
    return slot


def merge_equal(recording: Recording) -> None:
    """Computes equal expressions once: the same function of the same values, none of which is written to later on."""
    written = recording.written()
    last_write: dict[int, int] = {}
    for index, op in enumerate(recording.ops):
        for slot in op.writes:
            last_write[recording.alias[slot]] = index

    replaced: dict[int, int] = {}
    _merge_constants(recording, written, replaced)

    # Memory that is written to after an operation read it would give a later, equal expression another value.
    seen: dict[Any, list[int]] = {}
    kept: list[Op] = []
    for index, op in enumerate(recording.ops):
        _replace(op, replaced)
        pure = (
            op.is_pure
            and all(out < 0 or recording.alias[out] not in written for out in op.outs)
            and all(last_write.get(recording.alias[slot], -1) < index for slot in op.ins)
        )
        if pure:
            key = (op.function, _key(op.args), tuple((name, _key(op.kwargs[name])) for name in sorted(op.kwargs)))
            if key in seen:
                replaced.update((out, first) for out, first in zip(op.outs, seen[key], strict=True) if out >= 0)
                continue
            seen[key] = op.outs
        kept.append(op)

    recording.ops = kept
    _replace_outputs(recording, replaced)


def _merge_constants(recording: Recording, written: set[int], replaced: dict[int, int]) -> None:
    first: dict[Any, int] = {}
    for slot, tensor in recording.lifted.items():
        if tensor.numel() != 1 or recording.alias[slot] in written or tensor.device.type != "cpu":
            continue
        key = (recording.infos[slot], bytes(packed_bytes(tensor).tolist()))
        if first.setdefault(key, slot) != slot:
            replaced[slot] = first[key]


def _key(argument: Argument) -> Any:
    if isinstance(argument, list):
        return tuple(_key(each) for each in argument)
    if isinstance(argument, Slot):
        return argument
    return type(argument).__name__, repr(argument)  # repr tells 0.0 from -0.0


def _replace(op: Op, replaced: dict[int, int]) -> None:
    if not replaced or not any(slot in replaced for slot in (*op.ins, *op.outs)):
        return

    def final(slot: int) -> int:
        while slot in replaced:
            slot = replaced[slot]
        return slot

    op.args = [substitute(argument, lambda slot: Slot(final(slot))) for argument in op.args]
    op.kwargs = {name: substitute(argument, lambda slot: Slot(final(slot))) for name, argument in op.kwargs.items()}
    op.ins = [final(slot) for slot in op.ins]
    if op.writes:
        op.writes = [final(slot) for slot in op.writes]
        op.outs = [final(slot) if slot >= 0 else slot for slot in op.outs]


def _replace_outputs(recording: Recording, replaced: dict[int, int]) -> None:
    def final(slot: int) -> int:
        while slot in replaced:
            slot = replaced[slot]
        return slot

    for op in recording.ops:
        _replace(op, replaced)
    recording.losses = [Slot(final(loss.index)) if isinstance(loss, Slot) else loss for loss in recording.losses]
    recording.grads = [final(slot) for slot in recording.grads]
    recording.accumulated = {index: final(slot) for index, slot in recording.accumulated.items()}
    recording.checks = [type(check)(final(check.slot), check.answer, check.line) for check in recording.checks]


def remove_unused_constants(recording: Recording) -> None:
    """Lets go of constants that no operation reads any more."""
    used = {
        slot for op in recording.ops for argument in (op.args, list(op.kwargs.values())) for slot in slots_in(argument)
    }
    used.update(recording.outputs())
    recording.lifted = {slot: tensor for slot, tensor in recording.lifted.items() if slot in used}


PASSES: dict[str, Callable[[Recording], None]] = {
    "accumulate_at_end": accumulate_at_end,
    "remove_dead": remove_dead,
    "drop_identities": drop_identities,
    "fold_constants": fold_constants,
    "narrow_uniform": narrow_uniform,
    "merge_equal": merge_equal,
    "remove_dead_again": remove_dead,
}

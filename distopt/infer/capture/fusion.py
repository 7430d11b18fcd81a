"""A shortened recording with one function in the place of its arithmetic, which torch's compiler inductor has made.

Draws from the generator stay operations of the recording, in their order and with their bits: what they depend on must
not be computed from parameters or arguments. All other operations become a graph with the small parameters in one flat
tensor, the small gradients in another, and are compiled. Sums are then taken in another order and intermediate results
are not rounded where eager ones are, so that the bits differ from an eager step's, by as much as its own error.

On a GPU the draws and the function's kernels are one CUDA graph. The bits of a step must not depend on which thread
block comes first, so what inductor would sum up by atomic additions, the gradient of a gather, is a sum over a mask, or
left to torch's own kernel.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from distopt.infer.capture.cuda_graph import uses_gpu
from distopt.infer.capture.decompositions import STORE
from distopt.infer.capture.inductor import compile_graph
from distopt.infer.capture.recording import HostCall, Op, PackCall, Recording, Slot, TensorInfo, aten, substitute

MAX_PACKED_NUMEL = 4096
"""Parameters and gradients up to this size lie side by side in one tensor: a kernel's argument costs as much as many
elements, and copying larger ones costs more than an argument."""

MAX_MASK_NUMEL = 2**26
"""Levels times rows up to which the gradient of a gather is a sum over a mask on a GPU."""

SUMS_OVER_MASKS = {"cuda"}
"""Devices on which it is one; a CPU's own loop over the rows is quicker."""

MIN_REPEATS = 4
"""How many times as large as a computed tensor a result must be for the tensor to be stored before it is read."""

_EMPTY_LIKE = {aten.empty_like.default, aten.new_empty.default}


class NotCompiledError(Exception):
    """Why a recording is not compiled."""


@dataclass(slots=True)
class Fused:
    """A recording with a compiled function.

    Attributes:
        recording: Its operations: draws, then one call of the function.
        key: What its bits depend on.
        compile_s: How long compiling took, in seconds.
    """

    recording: Recording
    key: str
    compile_s: float


def fuse(recording: Recording, params: Sequence[Tensor]) -> Fused:
    """Returns a recording that computes the same by a compiled function.

    Args:
        recording: A shortened recording that is not refused.
        params: The parameters of the store.

    Raises:
        NotCompiledError: It cannot be compiled, or there is no compiler.
    """
    _refuse(recording)
    draws, body = _split(recording)
    plan = _Plan(recording, params, draws, body)
    start = time.monotonic()
    try:
        key, function = compile_graph(plan.graph, plan.examples)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise NotCompiledError(f"torch's compiler failed: {type(error).__name__}: {first}") from error
    return Fused(plan.recording(function), key, time.monotonic() - start)


# What is compiled, and what is not.


def _refuse(recording: Recording) -> None:
    """Refuses what would make the bits of a step depend on more than its number and the configuration."""
    # A branch that goes another way takes an eager step: which list is compiled would follow from the step at which
    # the process began.
    if recording.checks:
        raise NotCompiledError(f"a branch is taken on the values of a tensor, at {recording.checks[0].line}")
    outside = {recording.alias[slot] for slot in (*range(recording.num_inputs), *recording.foreign)}
    for op in recording.ops:
        if op.is_host:
            raise NotCompiledError(f"{op.describe()} is called within the step")
        if any(recording.alias[slot] in outside for slot in op.writes):
            raise NotCompiledError(f"the step writes to a tensor that existed before it, {op.describe()}")
        if op.function is aten._linalg_check_errors.default and uses_gpu(recording):
            raise NotCompiledError(f"whether a factorization has succeeded is read, {op.describe()}")
    for info in recording.infos:
        if info.device.type not in ("cpu", "cuda") or info.dtype.is_complex:
            raise NotCompiledError(f"there is a tensor of {info.dtype} on {info.device}")


def _split(recording: Recording) -> tuple[list[Op], list[Op]]:
    """Returns the operations that draws consist of, and all others."""
    ops = [_without_argument(op, recording) for op in recording.ops]
    drawing = _drawing(ops, recording)
    drawn = {recording.alias[slot] for slot in recording.lifted}  # memory
    random: set[int] = set()  # that of them which holds random numbers
    draws: list[Op] = []
    body: list[Op] = []
    used: set[int] = set()  # memory that the body has read
    for index, op in enumerate(ops):
        if index in drawing:
            if any(recording.alias[slot] in used for slot in op.writes):
                raise NotCompiledError(f"a random number is overwritten, {op.describe()}")
            draws.append(op)
            drawn.update(recording.alias[slot] for slot in op.outs if slot >= 0)
            if op.is_random:
                random.update(recording.alias[slot] for slot in (*op.outs, *op.writes) if slot >= 0)
            continue
        if op.is_random:
            raise NotCompiledError(f"a random number is drawn that depends on computed values, {op.describe()}")
        if changed := drawn.intersection(recording.alias[slot] for slot in op.writes):
            what = "a random number" if changed & random else "a tensor that torch has made, as by zeros(),"
            raise NotCompiledError(f"{what} is changed in place, {op.describe()}")
        body.append(op)
        used.update(recording.alias[slot] for slot in op.ins)
    if not body:
        raise NotCompiledError("nothing is computed")
    return draws, body


def _drawing(ops: Sequence[Op], recording: Recording) -> set[int]:
    """Returns which operations draw, or make what is drawn from or into: by index, those that need no parameters.

    What else is computed from random numbers and constants alone is the compiler's, which does not write it to memory.
    """
    early = set(recording.lifted)
    candidates = []
    for index, op in enumerate(ops):
        if all(slot in early for slot in op.ins):
            candidates.append(index)
            early.update(op.outs)

    # What changes memory in place stays with the draws that use that memory, before or after it.
    shared = {recording.alias[slot] for slot in recording.lifted}
    while True:
        drawing = _needed_by_draws(ops, candidates, shared, recording.alias)
        touched = {
            recording.alias[slot] for index in drawing for slot in (*ops[index].ins, *ops[index].outs) if slot >= 0
        }
        if touched <= shared:
            return drawing
        shared |= touched


def _needed_by_draws(ops: Sequence[Op], candidates: Sequence[int], shared: set[int], alias: Sequence[int]) -> set[int]:
    """Returns which candidates draw, make what is drawn from, or change memory that is shared with draws."""
    drawing: set[int] = set()
    needed: set[int] = set()
    written: set[int] = set()  # memory, by those that draw later
    for index in reversed(candidates):
        op = ops[index]
        is_before_write = any(alias[slot] in written for slot in op.ins)
        writes_shared = any(alias[slot] in shared for slot in op.writes)
        if op.is_random or writes_shared or is_before_write or any(slot in needed for slot in op.outs):
            drawing.add(index)
            needed.update(op.ins)
            written.update(alias[slot] for slot in op.writes)
    return drawing


def _without_argument(op: Op, recording: Recording) -> Op:
    """Returns an operation that makes the same memory without the tensor whose shape it was to have."""
    if op.function not in _EMPTY_LIKE:
        return op
    info = recording.infos[op.outs[0]]
    arguments = {"dtype": info.dtype, "device": info.device}
    sizes = [list(info.shape), list(info.stride)]
    return Op(aten.empty_strided.default, sizes, arguments, op.outs, [], [], op.line)


# The graph.


@dataclass(slots=True)
class _Packed:
    """Tensors of one dtype side by side."""

    dtype: torch.dtype
    slots: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    numel: int = 0

    def add(self, slot: int, info: TensorInfo) -> None:
        self.slots.append(slot)
        self.offsets.append(self.numel)
        self.numel += math.prod(info.shape)

    def views(self, flat: Tensor, infos: Sequence[TensorInfo]) -> Iterator[Tensor]:
        for slot, offset in zip(self.slots, self.offsets, strict=True):
            shape = infos[slot].shape
            yield flat[offset : offset + math.prod(shape)].view(shape)


class _Plan:
    """The graph of what is compiled, and what stands around it.

    Small parameters lie side by side, small random numbers and small gradients likewise.

    Args:
        recording: The whole step.
        params: The parameters.
        draws: Operations that stay as they are.
        body: Those that become the graph.
    """

    def __init__(self, recording: Recording, params: Sequence[Tensor], draws: list[Op], body: list[Op]) -> None:
        self._recording = recording
        self._draws = draws
        self._device = next(
            (info.device for info in recording.infos if info.device.type == "cuda"), torch.device("cpu")
        )
        made = {slot for op in body for slot in op.outs}
        # In the order of parameters, whether a step leaves gradients or adds to those that are there: it is one list.
        grads = [recording.accumulated.get(index, slot) for index, slot in enumerate(recording.grads)]
        self._results = [slot for slot in dict.fromkeys((*recording.loss_slots(), *grads)) if slot in made]
        needed = dict.fromkeys(slot for op in body for slot in op.ins if slot not in made)
        # Memory that is never copied: what came from outside lies there already, views see what is written to it, and
        # some look at it without regard to shapes.
        strided = (slot for op in body if op.function is aten.as_strided.default for slot in op.ins)
        self._never_stored = {recording.alias[slot] for slot in (*needed, *strided)} | recording.written()

        drawn = {slot for op in draws for slot in op.outs}
        self._packed_inputs = self._pack(slot for slot in needed if self._is_packed(slot, drawn))
        packed = {slot for pack in self._packed_inputs for slot in pack.slots}
        self._inlined = [slot for slot in needed if slot in self._constants() and self._is_one_number(slot)]
        self._inputs = [slot for slot in needed if slot not in packed and slot not in self._inlined]

        self._packed_results = self._pack(slot for slot in self._results if slot in grads and self._is_small(slot))
        packed = {slot for pack in self._packed_results for slot in pack.slots}
        self._single_results = [slot for slot in self._results if slot not in packed]

        self.examples: list[Tensor] = []
        self.graph = self._make_graph(body)

    def _constants(self) -> dict[int, Tensor]:
        """Returns what is part of the graph: numbers that the step made, and on a GPU those that are on the CPU."""
        compared = self._recording.compared if self._device.type == "cuda" else {}
        return self._recording.lifted | {slot: value for slot, value in compared.items() if value.device.type == "cpu"}

    def _is_one_number(self, slot: int) -> bool:
        info = self._recording.infos[slot]
        return 0 not in info.shape and not any(info.stride)

    def _is_small(self, slot: int) -> bool:
        return 0 < math.prod(self._recording.infos[slot].shape) <= MAX_PACKED_NUMEL

    def _is_packed(self, slot: int, drawn: set[int]) -> bool:
        # A view of the flat tensor is contiguous, as the graph's operations may take for granted.
        if not (slot < self._recording.num_params or slot in drawn) or not self._is_small(slot):
            return False
        info = self._recording.infos[slot]
        return torch.empty_strided(info.shape, info.stride, device="meta").is_contiguous()

    def _pack(self, slots: Iterator[int]) -> list[_Packed]:
        packs: dict[torch.dtype, _Packed] = {}
        for slot in slots:
            info = self._recording.infos[slot]
            packs.setdefault(info.dtype, _Packed(info.dtype)).add(slot, info)
        return list(packs.values())

    def _make_graph(self, body: list[Op]) -> fx.GraphModule:
        infos = self._recording.infos
        graph = fx.Graph()
        nodes: dict[int, fx.Node] = {}
        for pack in self._packed_inputs:
            flat = self._input(graph, TensorInfo((pack.numel,), pack.dtype, (1,), self._device))
            for slot, offset in zip(pack.slots, pack.offsets, strict=True):
                shape = list(infos[slot].shape)
                segment = graph.call_function(aten.slice.Tensor, (flat, 0, offset, offset + math.prod(shape)))
                nodes[slot] = graph.call_function(aten.view.default, (segment, shape))
        for slot in self._inputs:
            nodes[slot] = self._input(graph, infos[slot])
        constants = self._constants()
        for slot in self._inlined:
            value = constants[slot]
            kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            number = graph.call_function(aten.full.default, ([], value[(0,) * value.dim()].item()), kwargs)
            nodes[slot] = graph.call_function(aten.expand.default, (number, list(value.shape)))

        for op in body:
            self._add(graph, op, nodes)
        outputs = [graph.call_function(aten.cat.default, ([self._flat(graph, nodes[slot]) for slot in pack.slots],))
                   for pack in self._packed_results]  # fmt: skip
        graph.output((*outputs, *(nodes[slot] for slot in self._single_results)))
        return fx.GraphModule(torch.nn.Module(), graph)

    def _input(self, graph: fx.Graph, info: TensorInfo) -> fx.Node:
        self.examples.append(torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=info.device))
        return graph.placeholder(f"input_{len(self.examples)}")

    def _flat(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(aten.reshape.default, (node, [-1]))

    def _add(self, graph: fx.Graph, op: Op, nodes: dict[int, fx.Node]) -> None:
        self._store_small(graph, op, nodes)
        args = tuple(substitute(argument, nodes.__getitem__) for argument in op.args)
        kwargs = {name: substitute(argument, nodes.__getitem__) for name, argument in op.kwargs.items()}
        if self._is_gradient_of_gather(op):
            nodes[op.outs[0]] = self._add_sum_by_level(graph, op, args)
            return
        node = graph.call_function(op.function, args, kwargs)
        returns = op.function._schema.returns
        if len(returns) == 1 and str(returns[0].type) == "Tensor":
            (slot,) = op.outs
            if slot >= 0 and slot not in op.writes:
                nodes[slot] = node
            return
        for index, slot in enumerate(op.outs):
            if slot >= 0 and slot not in op.writes:
                nodes[slot] = graph.call_function(_getitem, (node, index))

    def _store_small(self, graph: fx.Graph, op: Op, nodes: dict[int, fx.Node]) -> None:
        """Has what an operation repeats for the elements of a larger result stored first.

        The compiler computes it again in each turn of the larger loop: the effects of some levels for each of many
        rows that gather them, or a gamma function of one number.
        """
        if self._device.type != "cpu":
            return
        infos = self._recording.infos
        numel = max((math.prod(infos[slot].shape) for slot in op.outs if slot >= 0), default=0)
        for slot in op.ins:
            is_computed = self._recording.alias[slot] not in self._never_stored and nodes[slot].target is not STORE
            if is_computed and MIN_REPEATS * math.prod(infos[slot].shape) <= numel:
                nodes[slot] = graph.call_function(STORE, (nodes[slot],))

    def _is_gradient_of_gather(self, op: Op) -> bool:
        """Returns whether an operation adds numbers to a vector at given indices, which a mask does on this device."""
        is_sum = op.function is aten.index_put.default and op.args[3:4] == [True]
        if not is_sum or self._device.type not in SUMS_OVER_MASKS:
            return False
        infos = self._recording.infos
        index = op.args[1]
        if not (isinstance(op.args[0], Slot) and len(index) == 1 and isinstance(op.args[2], Slot)):
            return False
        vector, rows, values = (infos[each.index] for each in (op.args[0], index[0], op.args[2]))
        is_vector = len(vector.shape) == 1 and rows.dtype == torch.int64 and values.shape == rows.shape
        return is_vector and vector.shape[0] * math.prod(rows.shape) <= MAX_MASK_NUMEL

    def _add_sum_by_level(self, graph: fx.Graph, op: Op, args: tuple[Any, ...]) -> fx.Node:
        """Adds the sum of each level's numbers, over a mask: in one order, and fused with what computes them."""
        (size,) = self._recording.infos[op.args[0].index].shape
        vector, (rows,), values = args[:3]

        def call(function: Any, *arguments: Any, **keywords: Any) -> fx.Node:
            return graph.call_function(function.default, arguments, keywords)

        rows, values = (call(aten.reshape, each, [1, -1]) for each in (rows, values))
        is_counted_from_the_end = graph.call_function(aten.lt.Scalar, (rows, 0))
        from_the_end = graph.call_function(aten.add.Tensor, (rows, size))
        rows = graph.call_function(aten.where.self, (is_counted_from_the_end, from_the_end, rows))
        levels = call(aten.arange, size, dtype=torch.int64, device=self._device)
        mask = graph.call_function(aten.eq.Tensor, (rows, call(aten.reshape, levels, [-1, 1])))
        zero = graph.call_function(aten.full.default, ([], 0.0), {"dtype": self._dtype_of(op), "device": self._device})
        chosen = graph.call_function(aten.where.self, (mask, values, zero))
        return graph.call_function(aten.add.Tensor, (vector, graph.call_function(aten.sum.dim_IntList, (chosen, [1]))))

    def _dtype_of(self, op: Op) -> torch.dtype:
        return self._recording.infos[op.outs[0]].dtype

    # Around the function.

    def recording(self, function: Callable[..., Any]) -> Recording:
        """Returns the step with the compiled function in the place of the graph."""
        old = self._recording
        new = copy.copy(old)
        new.ops = list(self._draws)
        new.lifted = dict(old.lifted)
        flats = []
        for pack in self._packed_inputs:
            flat = torch.zeros(pack.numel, dtype=pack.dtype, device=self._device)
            flats.append(flat)
            copying = _packer(list(pack.views(flat, old.infos)))
            call = PackCall("packing of inputs", copying, flat, only_starts_kernels=True)
            new.ops.append(Op(call, [Slot(slot) for slot in pack.slots], {}, [], list(pack.slots), [], ""))

        # Results that lie side by side are copied to memory that stays, of which the gradients are views.
        fixed = []
        for pack in self._packed_results:
            flat = torch.zeros(pack.numel, dtype=pack.dtype, device=self._device)
            fixed.append(flat)
            new.lifted.update(zip(pack.slots, pack.views(flat, old.infos), strict=True))
        call_all = HostCall("the compiled step", _Call(function, flats, fixed), only_starts_kernels=True)
        inputs = [Slot(slot) for slot in self._inputs]
        new.ops.append(Op(call_all, inputs, {}, self._single_results, self._inputs, [], ""))
        return new


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def _packer(views: list[Tensor]) -> Callable[..., None]:
    def pack(*tensors: Tensor) -> None:
        torch._foreach_copy_(views, list(tensors))

    return pack


class _Call:
    """Calls a compiled function with what lies ready and what it is given."""

    def __init__(self, function: Callable[..., Any], flats: list[Tensor], fixed: list[Tensor]) -> None:
        self._function = function
        self._flats = flats
        self._fixed = fixed

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        results = self._function(*self._flats, *inputs)
        for fixed, result in zip(self._fixed, results, strict=False):
            fixed.copy_(result)
        singles: Sequence[Tensor] = results[len(self._fixed) :]
        return singles

"""Runs a recorded step on a GPU as one CUDA graph: all its kernels by one launch, with the bits of an eager step.

A graph reads and writes the addresses that it was recorded with. Parameters, what the step reads from outside, and the
buffers that gradients are left in stay where they are from step to step; should one move, the graph is made anew.
Arguments are copied to memory of the program's own first. Random numbers are an eager step's: each replay takes the
generator's seed and place, and moves it on as the recorded operations did.

Losses and checks come back together, in the step's only wait for the GPU.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.infer.capture.generators import generator_states
from distopt.infer.capture.passes import MAX_COMPARED_FOLD_BYTES, new_slot
from distopt.infer.capture.program import RAN, PythonProgram, put_back
from distopt.infer.capture.recording import Check, Op, Recording, Slot, TensorInfo, aten

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8
"""Graphs of one program: for memory that keeps moving a graph is no gain."""


class NoGraphError(Exception):
    """A step that cannot be a CUDA graph; the message says why."""


def uses_gpu(recording: Recording) -> bool:
    """Returns whether a step computes anything on a GPU."""
    return any(slot >= 0 and recording.infos[slot].device.type == "cuda" for op in recording.ops for slot in op.outs)


def graph_refusal(recording: Recording) -> str | None:
    """Returns why a step cannot be one CUDA graph; None if it can.

    Whatever the host computes is done once, when the graph is made, so the step's list must be the GPU's but for
    constants. Numbers from the CPU that existed before the step are compared from now on, see `Recording.compared`.
    """
    if set(recording.with_grad) - recording.accumulated.keys():
        return "gradients that are there before the step are used within it"
    constants = recording.lifted.keys() | recording.compared.keys()
    for op in recording.ops:
        if op.is_host and not op.function.only_starts_kernels:
            return f"Python code runs within the step ({op.describe()}), which a CUDA graph cannot hold"
        for slot in (*op.ins, *op.outs):
            if slot < 0 or recording.infos[slot].device.type == "cuda" or slot in constants:
                continue
            if not _is_comparable(recording, slot):
                return f"the CPU computes a part of a step on the GPU ({op.describe()})"
            recording.compared[slot] = recording.foreign[slot].detach().clone()
            constants |= {slot}
    if not all(recording.infos[slot].device.type == "cuda" for slot in recording.outputs()):
        return "a loss or gradient of a step on the GPU lies on the CPU"
    return None


def build_graph(recording: Recording, params: Sequence[Tensor], args: Sequence[Tensor]) -> CudaGraphProgram:
    """Returns the program of a recording that uses a GPU.

    Args:
        recording: A shortened recording that is not refused.
        params: The parameters of the store at that time.
        args: The tensors among the arguments at that time.

    Raises:
        NoGraphError: The step cannot be a CUDA graph. Parameters, generators and what the step writes to are as before.
    """
    reason = graph_refusal(recording)
    if reason is not None:
        raise NoGraphError(reason)
    first: RuntimeError | None = None
    for _ in range(2):
        try:
            return CudaGraphProgram(recording, params, args)
        except RuntimeError as error:
            # What another thread did at that moment (a library that synchronizes the device) is over by the next try.
            # An operation that waits for the GPU, or memory that is full, fails again.
            logger.info("recording a CUDA graph failed: %s", error)
            first = first or error
    raise NoGraphError(f"the step cannot be a CUDA graph: {first}") from first


def without_waits(recording: Recording) -> Recording:
    """Returns an equal recording that leaves out what torch reads from the GPU only to look for errors.

    Recorded, the gradient of an index is an `index_put`, which looks at the index's range, in some releases of torch by
    a wait; autograd trusts an index that the step has read with, and so does the graph. That a factorization has
    succeeded becomes a check of the graph like any other.
    """
    step = copy.copy(recording)
    step.ops = []
    step.infos = list(recording.infos)
    step.alias = list(recording.alias)
    step.checks = list(recording.checks)
    read_with: set[str] = set()
    for op in recording.ops:
        if op.function is aten._linalg_check_errors.default:
            info = recording.infos[op.ins[0]]
            failed = new_slot(step, TensorInfo((), torch.bool, (), info.device))
            step.ops.append(Op(aten.any.default, [op.args[0]], {}, [failed], [op.ins[0]], [], op.line))
            step.checks.append(Check(failed, False, op.line))
        elif op.function is aten.index_put.default and repr(op.args[1]) in read_with:
            step.ops += _trusted_index_put(step, op)
        else:
            step.ops.append(op)
        if op.function is aten.index.Tensor:
            read_with.add(repr(op.args[1]))
    return step


def _trusted_index_put(recording: Recording, op: Op) -> list[Op]:
    (out,) = op.outs
    start = op.args[0]
    assert isinstance(start, Slot)
    info = recording.infos[out]
    copied = new_slot(recording, info)
    recording.alias[out] = copied
    copying = Op(
        aten.clone.default, [start], {"memory_format": torch.preserve_format}, [copied], [start.index], [], op.line
    )
    accumulate = op.args[3] if len(op.args) > 3 else op.kwargs.get("accumulate", False)
    arguments = [Slot(copied), op.args[1], op.args[2], accumulate, True]
    ins = [copied, *(slot for slot in op.ins if slot != start.index)]
    return [copying, Op(aten._index_put_impl_.default, arguments, {}, [out], ins, [copied], op.line)]


def _is_comparable(recording: Recording, slot: int) -> bool:
    tensor = recording.foreign.get(slot)
    small = tensor is not None and tensor.numel() * tensor.element_size() <= MAX_COMPARED_FOLD_BYTES
    return small and recording.alias[slot] not in recording.written()


def _gradient_slots(recording: Recording) -> dict[int, int]:
    """Returns by parameter the slot of the gradient that the step computes for it."""
    slots = {index: slot for index, slot in enumerate(recording.grads) if slot >= recording.num_inputs}
    return slots | recording.accumulated


def _settings() -> tuple[int, ...]:
    """Returns the settings of torch's by which its libraries choose kernels: a graph holds those that were chosen."""
    return (
        torch._C._get_cublas_allow_tf32(),
        torch._C._get_cudnn_allow_tf32(),
        torch._C._get_cudnn_deterministic(),
        torch._C._get_deterministic_algorithms(),
    )


class CudaGraphProgram(PythonProgram):
    """A recorded step as a CUDA graph.

    Args:
        recording: A shortened recording for which `graph_refusal` returns None.
        params: The parameters of the store at that time.
        args: The tensors among the arguments at that time.

    Raises:
        RuntimeError: An operation of the step cannot be part of a graph, such as one that waits for the GPU.
    """

    def __init__(self, recording: Recording, params: Sequence[Tensor], args: Sequence[Tensor]) -> None:
        recording = without_waits(recording)
        super().__init__(recording, params, args)
        self._device = recording.infos[recording.outputs()[0]].device
        self._inputs = [torch.empty_like(arg) for arg in args]
        count = len(recording.checks) + len(recording.loss_slots())
        self._numbers = torch.zeros(count, dtype=torch.float64, device=self._device)
        self._gradients = _gradient_slots(recording)
        self._flats, self._views = self._allocate_gradients()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: list[int] = []
        self._num_graphs = 0
        with torch.no_grad():
            self._copy_inputs(args)
        self._record_graph()

    def _compute_step(self, args: Sequence[Tensor]) -> tuple[int, list[float]]:
        if self._addresses != self._present_addresses():
            self._record_graph()
        assert self._graph is not None
        self._copy_inputs(args)
        self._graph.replay()

        numbers = self._numbers.tolist()
        num_checks = len(self._recording.checks)
        status, losses = self._status(numbers[:num_checks], numbers[num_checks:])
        if status == RAN:
            for tensor in self._written_tensors():
                torch.autograd.graph.increment_version(tensor)
            self._leave_gradients()
        return status, losses

    # The graph.

    def _present_addresses(self) -> list[int]:
        buffers = [buffer for buffer in self._buffers if buffer is not None]
        addresses = [tensor.data_ptr() for tensor in (*self._params, *self._recording.foreign.values(), *buffers)]
        return [*addresses, *_settings()]

    def _record_graph(self) -> None:
        if self._num_graphs >= MAX_GRAPHS:
            raise RuntimeError(f"memory of parameters or data has moved {MAX_GRAPHS} times")
        self._num_graphs += 1
        self._graph = None
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        states = generator_states()
        saved = [(tensor, tensor.clone()) for tensor in self._written_tensors()]

        # Once without a graph: libraries allocate what they need at first use, which they may not do within one.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                self._compute()
        finally:
            torch.cuda.current_stream(self._device).wait_stream(stream)
            put_back(states, saved)

        # Other threads may use the GPU meanwhile: NCCL's, and those that copy a checkpoint.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._compute()
        self._graph = graph
        self._addresses = self._present_addresses()

    @torch.no_grad()
    def _compute(self) -> None:
        """Runs the operations; leaves checks and losses side by side, and gradients where they are wanted."""
        recording = self._recording
        values = self._run_ops(self._inputs)
        numbers = [values[check.slot] for check in recording.checks]
        numbers += [values[slot] for slot in recording.loss_slots()]
        if numbers:
            self._numbers.copy_(torch.stack([number.reshape(()).double() for number in numbers]))
        if self._gradients:
            targets = [self._target(index) for index in self._gradients]
            torch._foreach_copy_(targets, [values[slot] for slot in self._gradients.values()])

    def _copy_inputs(self, args: Sequence[Tensor]) -> None:
        for memory, arg in zip(self._inputs, args, strict=True):
            memory.copy_(arg)

    # Gradients.

    def _allocate_gradients(self) -> tuple[dict[torch.dtype, Tensor], dict[int, Tensor]]:
        """Returns one tensor for the gradients of each dtype, and by parameter its part of it."""
        infos = {index: self._recording.infos[slot] for index, slot in self._gradients.items()}
        flats = {
            dtype: torch.zeros(
                sum(math.prod(info.shape) for info in infos.values() if info.dtype == dtype),
                dtype=dtype,
                device=self._device,
            )
            for dtype in {info.dtype for info in infos.values()}
        }
        views: dict[int, Tensor] = {}
        used = dict.fromkeys(flats, 0)
        for index, info in infos.items():
            # What is added to a gradient may be an expanded number, which cannot be written to.
            added = index in self._recording.accumulated
            stride = torch.empty(info.shape, device="meta").stride() if added else info.stride
            views[index] = flats[info.dtype].as_strided(info.shape, stride, used[info.dtype])
            used[info.dtype] += math.prod(info.shape)
        return flats, views

    def _target(self, index: int) -> Tensor:
        buffer = self._buffers[index]
        return self._views[index] if buffer is None or index in self._recording.accumulated else buffer

    def _leave_gradients(self) -> None:
        self._add_to_gradients([*self._recording.accumulated])

        # The next step overwrites what the graph has written, so gradients that have no buffer are copied, all of one
        # dtype at once: somebody may keep them.
        new = [index for index in self._gradients if index not in self._recording.accumulated]
        fresh = {}
        if any(self._buffers[index] is None for index in new):
            fresh = {dtype: flat.clone() for dtype, flat in self._flats.items()}
        for index in new:
            param, buffer, view = self._params[index], self._buffers[index], self._views[index]
            if buffer is None:
                buffer = fresh[view.dtype].as_strided(view.shape, view.stride(), view.storage_offset())
            param.grad = buffer

    def _add_to_gradients(self, indices: list[int]) -> None:
        """Adds new gradients to those that are there, in place or into the buffers, by one kernel for many."""
        if not indices:
            return
        grads = [grad for index in indices if (grad := self._params[index].grad) is not None]
        torch._foreach_add_(grads, [self._views[index] for index in indices])
        moved = [
            (index, buffer)
            for index, grad in zip(indices, grads, strict=True)
            if (buffer := self._buffers[index]) is not None and buffer.data_ptr() != grad.data_ptr()
        ]
        if moved:
            torch._foreach_copy_([buffer for _, buffer in moved], [grads[indices.index(index)] for index, _ in moved])
        for index, buffer in moved:
            self._params[index].grad = buffer

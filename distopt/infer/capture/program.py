"""Turns a recorded step into a program: one call that runs its operations, in C++ where the extension is built."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from distopt.infer.capture.direct import direct_op
from distopt.infer.capture.generators import generator_states, set_generator_states
from distopt.infer.capture.loops import Loop, lowered, with_loops
from distopt.infer.capture.recording import Op, PackCall, Recording, Slot, TensorInfo, same_bits, substitute
from distopt.infer.capture.turned_products import turn_products


def _load() -> Any:
    """Returns the extension, None where it is not built or was built for another torch."""
    try:
        module = importlib.import_module("distopt.infer.capture._graph")
    except ImportError:
        return None
    return module if torch.__version__ == module.TORCH else None


compiled = _load()

RAN = -1
INPUTS_DIFFER = -2
GRADIENTS_DIFFER = -3
CONSTANTS_DIFFER = -4
BUSY = -5
NOT_FINITE = -6


class Program(Protocol):
    """A step that runs without the model's Python code."""

    def run(self, store: dict[str, Tensor], args: Sequence[Tensor]) -> tuple[int, list[float]]:
        """Runs the step and leaves its gradients in the parameters' `.grad`.

        Args:
            store: The parameters by name, as Pyro's store holds them: the recorded ones, in the recorded order.
            args: The tensors among the step's arguments.

        Returns:
            `RAN` and the losses; or why it did not run: a negative status, `NOT_FINITE` for a loss that is not, or the
            index of the first check whose answer is another one than recorded. Then gradients and torch's generator are
            as they were before.
        """
        ...

    def matches(self, store: dict[str, Tensor], args: Sequence[Tensor]) -> bool:
        """Returns whether `run` would run the operations: all that the program was built for is as it was."""
        ...

    def set_gradient_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """Lets the step leave each parameter's gradient in memory of its shape; None: in memory of the program's."""
        ...


def build(recording: Recording, params: Sequence[Tensor], args: Sequence[Tensor], *, direct: bool = True) -> Program:
    """Returns the program of a recording.

    Args:
        recording: A shortened recording that is not refused.
        params: The parameters of the store at that time.
        args: The tensors among the arguments at that time.
        direct: Whether small arithmetic is done by the C++ loop itself.
    """
    if compiled is None:
        return PythonProgram(recording, params, args)
    program: Program = _Lowering(turn_products(recording), direct).build(params, args)
    return program


class _Lowering:
    """Builds the C++ program of a recording.

    Results of direct arithmetic have buffers that stay: views of them, and of constants, are made once, here, and their
    addresses are known before the program runs. Memory that anything writes to in place is excluded from both.
    """

    def __init__(self, recording: Recording, direct: bool) -> None:
        self._recording = recording
        self._direct = direct
        self._written = recording.written()
        self._program = compiled.Program()
        self._fixed: dict[int, Tensor] = {}

    def build(self, params: Sequence[Tensor], args: Sequence[Tensor]) -> Any:
        recording, program = self._recording, self._program
        for slot, tensor in recording.lifted.items():
            self._fixed[slot] = tensor
            program.set_fixed(slot, tensor)
        for item in with_loops(recording) if self._direct else recording.ops:
            if isinstance(item, Loop):
                self._add_loop(item)
            else:
                self._add(item)

        # What comes from outside is looked at before each run: pointers and strides were computed for what it was.
        for slot, tensor in recording.foreign.items():
            program.set_foreign(slot, tensor, recording.compared.get(slot), recording.alias[slot] in self._written)
        program.set_inputs(tuple(params), recording.with_grad, list(args))

        for slot in recording.loss_slots():
            program.add_loss(slot)
        for check in recording.checks:
            program.add_check(check.slot, check.answer)
        for index, slot in recording.accumulated.items():
            program.add_accumulation(index, slot)
        for index, slot in enumerate(recording.grads):
            if slot >= 0 and not recording.num_params <= slot < recording.num_inputs:
                info = recording.infos[slot]
                like = torch.empty_strided(info.shape, info.stride, dtype=info.dtype, device=info.device)
                program.add_gradient(index, slot, like)

        program.finish(len(recording.infos))
        return program

    def _add(self, op: Op) -> None:
        if op.is_host:
            if isinstance(op.function, PackCall):
                self._program.add_pack(op.ins, op.function.flat)
            else:
                self._program.add_host(op.function.function, op.ins, op.outs)
            return
        if self._is_view_of_fixed(op):
            self._add_view(op)
            return
        direct = direct_op(op, self._recording) if self._direct else None
        if direct is None or self._recording.alias[op.outs[0]] in self._written:
            schema = op.function._schema
            self._program.add_op(schema.name, schema.overload_name, _arguments(op), op.outs)
            return

        # Operands with a fixed address are handed over as tensors, the others as slots, read when the program runs.
        out = self._recording.infos[op.outs[0]]
        result = torch.empty(out.shape, dtype=out.dtype)
        operands: list[tuple[int, Tensor | None, int, list[int]]] = []
        for value, layout, offsets in direct.operands:
            if isinstance(value, Slot) and value.index not in self._fixed:
                operands.append((value.index, None, layout, offsets))
            else:
                operands.append((-1, self._fixed[value.index] if isinstance(value, Slot) else value, layout, offsets))
        like = torch.empty(0, dtype=direct.dtype)
        self._program.add_direct(direct.name, result, like, op.outs[0], operands, direct.extent)
        self._fixed[op.outs[0]] = result

    def _add_loop(self, loop: Loop) -> None:
        infos = [self._recording.infos[slot] for slot in loop.outs]
        outs = [
            (slot, torch.empty(info.shape, dtype=info.dtype, device="meta"))
            for slot, info in zip(loop.outs, infos, strict=True)
        ]
        operations, num_temporaries = lowered(loop, self._fixed)
        self._program.add_loop(operations, outs, num_temporaries)

    def _is_view_of_fixed(self, op: Op) -> bool:
        return (
            op.function.is_view
            and bool(op.ins)
            and all(slot in self._fixed for slot in op.ins)
            and all(slot >= 0 and self._recording.alias[slot] not in self._written for slot in op.outs)
        )

    def _add_view(self, op: Op) -> None:
        for slot, tensor in zip(op.outs, _call(op, self._fixed), strict=True):
            self._fixed[slot] = tensor
            self._program.set_fixed(slot, tensor)


def _call(op: Op, values: Any) -> list[Tensor]:
    with torch.no_grad():
        result = op.function(
            *(substitute(argument, values.__getitem__) for argument in op.args),
            **{name: substitute(argument, values.__getitem__) for name, argument in op.kwargs.items()},
        )
    return list(result) if isinstance(result, list | tuple) else [result]


def _arguments(op: Op) -> list[tuple[str, Any]]:
    """Returns each argument of the operator's schema as (kind, value)."""
    arguments: list[tuple[str, Any]] = []
    for position, argument in enumerate(op.function._schema.arguments):
        if position < len(op.args):
            value = op.args[position]
        else:
            value = op.kwargs.get(argument.name, argument.default_value)

        if isinstance(value, Slot):
            arguments.append(("slot", value.index))
        elif isinstance(value, list) and any(isinstance(each, Slot) for each in value):
            kind = "optional_tensors" if "Optional" in str(argument.type) else "tensors"
            arguments.append((kind, [each.index if isinstance(each, Slot) else -1 for each in value]))
        else:
            arguments.append(("constant", value))
    return arguments


class PythonProgram:
    """The same program as a loop in Python, where no extension is built: about 0.4 of an eager step."""

    def __init__(self, recording: Recording, params: Sequence[Tensor], args: Sequence[Tensor]) -> None:
        self._recording = recording
        self._params = list(params)
        self._args = [_layout(tensor) for tensor in args]
        self._param_layouts = [_layout(tensor) for tensor in params]
        self._hooks = [_hooks_of(tensor) for tensor in params]
        self._foreign_layouts = {slot: _layout(tensor) for slot, tensor in recording.foreign.items()}
        written = recording.written()
        self._written_storages = {
            _storage_of(tensor) for slot, tensor in recording.foreign.items() if recording.alias[slot] in written
        }
        self._running = False
        self._buffers: Sequence[Tensor | None] = [None] * len(self._params)
        self._dead = _last_uses(recording)

    def set_gradient_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """As `Program.set_gradient_buffers`."""
        self._buffers = buffers

    def matches(self, store: dict[str, Tensor], args: Sequence[Tensor]) -> bool:
        """As `Program.matches`."""
        return not self._running and self._inputs_status(store, args) == RAN

    def run(self, store: dict[str, Tensor], args: Sequence[Tensor]) -> tuple[int, list[float]]:
        """As `Program.run`."""
        if self._running:
            return BUSY, []
        status = self._inputs_status(store, args)
        if status != RAN:
            return status, []

        states = generator_states()
        saved = [(tensor, tensor.clone()) for tensor in self._written_tensors()]
        self._running = True
        try:
            with torch.no_grad():
                status, losses = self._compute_step(args)
        except BaseException:
            put_back(states, saved)
            raise
        finally:
            self._running = False
        if status != RAN:
            put_back(states, saved)
            return status, []
        return RAN, losses

    def _compute_step(self, args: Sequence[Tensor]) -> tuple[int, list[float]]:
        """Runs the operations; returns the status and the losses, and leaves gradients if it is `RAN`."""
        values = self._run_ops(args)
        answers = (values[check.slot].item() for check in self._recording.checks)
        losses = (values[slot].item() for slot in self._recording.loss_slots())
        status, numbers = self._status(answers, losses)
        if status == RAN:
            self._hand_out_gradients(values)
        return status, numbers

    def _status(self, answers: Iterable[float], losses: Iterable[float]) -> tuple[int, list[float]]:
        """Returns the index of the first check with another answer, `NOT_FINITE`, or `RAN`; and the losses."""
        for index, (check, answer) in enumerate(zip(self._recording.checks, answers, strict=True)):
            if bool(answer) != check.answer:
                return index, []
        numbers = list(losses)
        return (RAN if all(map(math.isfinite, numbers)) else NOT_FINITE), numbers

    def _written_tensors(self) -> list[Tensor]:
        """Returns the tensors outside that the step writes to: a step that fails must leave nothing behind."""
        recording = self._recording
        written = recording.written()
        tensors = [tensor for slot, tensor in recording.foreign.items() if recording.alias[slot] in written]
        grads = [self._params[index].grad for index in recording.with_grad if index not in recording.accumulated]
        return tensors + [grad for grad in grads if grad is not None]

    def _inputs_status(self, store: dict[str, Tensor], args: Sequence[Tensor]) -> int:
        recording = self._recording
        if len(store) != len(self._params) or any(
            a is not b for a, b in zip(store.values(), self._params, strict=True)
        ):
            return INPUTS_DIFFER
        if [_layout(each) for each in self._params] != self._param_layouts or [
            _layout(each) for each in args
        ] != self._args:
            return INPUTS_DIFFER
        if [_hooks_of(each) for each in self._params] != self._hooks:
            return INPUTS_DIFFER
        if self._written_storages & set(map(_storage_of, args)):  # when the step was recorded, they were apart
            return INPUTS_DIFFER
        if [index for index, param in enumerate(self._params) if param.grad is not None] != recording.with_grad:
            return GRADIENTS_DIFFER
        for slot, tensor in recording.foreign.items():
            if _layout(tensor) != self._foreign_layouts[slot]:
                return CONSTANTS_DIFFER
            if slot in recording.compared and not same_bits(tensor, recording.compared[slot]):
                return CONSTANTS_DIFFER
        return RAN

    def _run_ops(self, args: Sequence[Tensor]) -> dict[int, Tensor]:
        recording = self._recording
        values: dict[int, Tensor] = {**recording.lifted, **recording.foreign}
        inputs = [*self._params, *(self._params[index].grad for index in recording.with_grad), *args]
        values.update((slot, tensor.detach()) for slot, tensor in enumerate(inputs) if tensor is not None)

        for op, dead in zip(recording.ops, self._dead, strict=True):
            if op.is_host:
                results = op.function.function(*(values[slot] for slot in op.ins))
                values.update(zip(op.outs, results or (), strict=True))
            else:
                for slot, tensor in zip(op.outs, _call(op, values), strict=True):
                    if slot >= 0 and slot not in op.writes:
                        values[slot] = tensor
            for slot in dead:
                values.pop(slot, None)
        return values

    def _hand_out_gradients(self, values: dict[int, Tensor]) -> None:
        recording = self._recording
        for index, slot in recording.accumulated.items():
            grad, buffer = self._params[index].grad, self._buffers[index]
            assert grad is not None
            self._params[index].grad = torch.add(grad, values[slot], out=grad if buffer is None else buffer)
        for param, slot, buffer in zip(self._params, recording.grads, self._buffers, strict=True):
            if slot >= 0 and not recording.num_params <= slot < recording.num_inputs:
                value = values[slot]
                param.grad = value.clone() if buffer is None else buffer.copy_(value)


def _last_uses(recording: Recording) -> list[list[int]]:
    """Returns for each operation the slots that nothing reads after it, so that their memory can be used again."""
    seen = set(recording.outputs())
    dead: list[list[int]] = []
    for op in reversed(recording.ops):
        slots = {slot for slot in (*op.ins, *op.outs) if slot >= 0} - seen
        dead.append(sorted(slots))
        seen |= slots
    return dead[::-1]


def put_back(states: list[Tensor], saved: list[tuple[Tensor, Tensor]]) -> None:
    """Puts back generators, and tensors that a step has written to."""
    set_generator_states(states)
    with torch.no_grad():
        for tensor, values in saved:
            tensor.copy_(values)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return TensorInfo.of(tensor), tensor.requires_grad


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _hooks_of(param: Tensor) -> tuple[bool, bool]:
    return param._backward_hooks is not None, param._post_accumulate_grad_hooks is not None

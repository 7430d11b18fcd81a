"""Appends the operations that reach torch's dispatcher to a recording, and notes the values that Python reads."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from distopt.infer.capture import watch
from distopt.infer.capture.callers import is_warning, model_line
from distopt.infer.capture.generators import generator_states, same_states
from distopt.infer.capture.recording import (
    UNINITIALIZED,
    Check,
    HostCall,
    Op,
    Recording,
    Slot,
    TensorInfo,
    aten,
    is_random,
)

_serial = itertools.count()

MAX_COMPARED_BYTES = 1 << 18
"""A foreign tensor that Python reads is compared before each captured step, at about 10 GB/s; larger ones refuse."""

_OTHER_MEMORY = frozenset({"aten::set_", "aten::resize_", "aten::resize_as_"})

# In-place operations on a tensor's shape. The tensor keeps its slot otherwise, so its description would go stale.
_INPLACE_VIEW = torch.Tag.inplace_view


class StaticSlots:
    """Slots that depend on no input, no random number and nothing that is written: their values never change.

    Args:
        recording: What they are slots of.

    Attributes:
        sources: Of each of them, and of some that are no longer static: the foreign tensors that it comes from.
    """

    def __init__(self, recording: Recording) -> None:
        self.sources: dict[int, frozenset[int]] = {}
        self._recording = recording
        self._slots: set[int] = set()

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def add(self, slot: int, sources: frozenset[int]) -> None:
        """Adds a slot."""
        self._slots.add(slot)
        self.sources[slot] = sources

    def follow(self, op: Op, *, is_random: bool) -> None:
        """Adds and removes what an operation makes static or not."""
        recording = self._recording
        if op.writes:
            # What is written may hold another value the next time, even where it was read before the write.
            written = {recording.alias[slot] for slot in op.writes}
            writes_constants = not is_random and all(slot in self._slots for slot in op.ins)
            foreign = any(alias in recording.foreign or alias < recording.num_inputs for alias in written)
            if not writes_constants or foreign:
                self._slots = {slot for slot in self._slots if recording.alias[slot] not in written}
            return

        if is_random or op.function in UNINITIALIZED or not all(slot in self._slots for slot in op.ins):
            return
        sources = frozenset().union(*(self.sources.get(slot, frozenset()) for slot in op.ins))
        for slot in op.outs:
            if slot >= 0:
                self.add(slot, sources)


class _UnguardedMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode from which torch need not keep its compiler off, for which it would import it: that takes seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recorder(_UnguardedMode):  # type: ignore[no-untyped-call]
    """Appends each operation that runs inside it to a `Recording`.

    A tensor carries its slot as an attribute, so that nothing is kept alive that the step itself would free; all other
    modes see the same operations as without it. What cannot be captured is noted and runs on: a recorded step is a
    true step, whatever becomes of the recording.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._attribute = f"_distopt_slot_{next(_serial)}"
        self._tagged: list[Tensor] = []
        # By address of a storage that stays alive throughout the recording, its first slot.
        self._alias_of_storage: dict[int, int] = {}
        self._static = StaticSlots(self.recording)
        self._generator_states: list[Tensor] | None = None
        self.first_argument = 0  # the first slot that is an argument's
        # A recorded step that raises an error is taken again eagerly, so its writes must be undone first.
        self.undo: dict[int, tuple[Tensor, Tensor]] = {}  # by alias: a foreign tensor, and its values before

    # Slots.

    def slot_of(self, tensor: Tensor) -> int | None:
        """Returns the slot of a tensor that the recording knows."""
        return getattr(tensor, self._attribute, None)

    def new_slot(self, tensor: Tensor, alias: int | None = None) -> int:
        """Gives a tensor the next slot; `alias` is an earlier slot with the same memory."""
        if (reason := _unsupported(tensor)) is not None:
            self.refuse(reason)
        recording = self.recording
        slot = len(recording.infos)
        recording.infos.append(TensorInfo.of(tensor))
        recording.alias.append(slot if alias is None else alias)
        setattr(tensor, self._attribute, slot)
        return slot

    def add_input(self, tensor: Tensor) -> int:
        """Gives a parameter, gradient or argument its slot. Its storage stays alive as long as its caller holds it."""
        return self._hold(tensor)

    def add_gradients(self, gradients: list[Tensor]) -> None:
        """Gives gradients their slots.

        They may lie side by side in a buffer from which they are reduced, or not, which makes no difference to a step:
        those that do not overlap count as memory of their own.
        """
        disjoint = _are_disjoint(gradients)
        for gradient in gradients:
            if disjoint:
                self.new_slot(gradient)
                self._tagged.append(gradient)
            else:
                self._hold(gradient)

    def _hold(self, tensor: Tensor) -> int:
        storage = _storage(tensor)
        slot = self.new_slot(tensor, self._alias_of_storage.get(storage))
        self._alias_of_storage.setdefault(storage, slot)
        self._tagged.append(tensor)
        return slot

    def _foreign(self, tensor: Tensor) -> int:
        """Takes in a tensor that no recorded operation made: it existed before the step."""
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            self.refuse(f"a {type(tensor).__name__}, which is a subclass of Tensor, is used")
        if tensor.layout is not torch.strided:
            self.refuse(f"a tensor of layout {tensor.layout} is used")
        if tensor.requires_grad and tensor.is_leaf:
            self.refuse("a tensor that requires a gradient is used, and is no parameter of the store")
        slot = self._hold(tensor)
        self.recording.foreign[slot] = tensor
        self._static.add(slot, frozenset([slot]))
        return slot

    # What stands in the way.

    def refuse(self, reason: str, *, transient: bool = False) -> None:
        """Notes why the step cannot be captured; the first reason counts."""
        if self.recording.refusal is None:
            line = model_line()
            self.recording.refusal = f"{reason}, at {line}" if line else reason
            self.recording.transient = transient

    def read(self, tensor: Tensor, name: str) -> None:
        """Notes that Python reads a tensor's values, which is allowed where they are the same in each step."""
        slot = self.slot_of(tensor)
        if slot is None:
            slot = self._foreign(tensor)
        if slot not in self._static:
            self.refuse(f"{name} reads a value that differs from step to step")
            return
        for source in self._static.sources[slot]:
            if source not in self.recording.compared:
                self._compare(source)

    def _compare(self, slot: int) -> None:
        tensor = self.recording.foreign[slot]
        if tensor.device.type != "cpu":  # comparing it before each step would wait for the GPU
            self.refuse(f"a value is read that depends on a tensor on {tensor.device}")
            return
        if tensor.numel() * tensor.element_size() > MAX_COMPARED_BYTES:
            self.refuse(f"a value is read that depends on a tensor of more than {MAX_COMPARED_BYTES >> 10} KiB")
            return
        with _disable_current_modes(), torch.no_grad():
            self.recording.compared[slot] = tensor.detach().clone()

    def is_static(self, tensor: Tensor) -> bool:
        """Returns whether a tensor's values are the same in each step."""
        slot = self.slot_of(tensor)
        return slot is None or slot in self._static

    # Operations.

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and records it."""
        # A watch would look at each function that is called here, and none of them is the user's.
        paused = watch.pause()
        try:
            with torch._C.DisableTorchFunction():
                kwargs = kwargs or {}
                if function is aten._local_scalar_dense.default:
                    return self._read_scalar(function, args[0])
                return self._run(function, args, kwargs)
        finally:
            watch.resume(paused)

    def _read_scalar(self, function: Any, tensor: Tensor) -> Any:
        if is_warning():
            return False if tensor.dtype == torch.bool else 0.0
        value = function(tensor)
        if tensor.dtype != torch.bool or self.is_static(tensor):
            self.read(tensor, ".item()")
            return value

        # A branch. The tensor may be overwritten later in the step, so its present value gets a slot of its own.
        slot = self.slot_of(tensor)
        assert slot is not None
        copy = self.new_slot(tensor.clone())
        line = model_line()
        self.recording.ops.append(Op(aten.clone.default, [Slot(slot)], {}, [copy], [slot], [], line))
        self.recording.checks.append(Check(copy, bool(value), line))
        return value

    def _run(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        schema = function._schema
        ins: list[int] = []
        aliases: dict[int, int] = {}

        # Arguments are encoded before the operation runs: it may change what a tensor looks like.
        op = Op(function, self._encoded(list(args), function, ins, aliases), {}, [], ins, [], model_line())
        op.kwargs = {name: self._encoded(value, function, ins, aliases) for name, value in kwargs.items()}
        inplace_view = _INPLACE_VIEW in function.tags
        if not inplace_view:
            op.writes = _written_slots(op)

        self._look_at(function, args, kwargs, op)

        random_op = is_random(function)
        if random_op:
            self._check_generator()
        result = function(*args, **kwargs)
        if random_op:
            self._generator_states = generator_states()

        # squeeze_, t_ and their like are recorded as the view that they are, under a new slot: shapes would go stale.
        if inplace_view:
            op.function = _view_of_same_arguments(function)
        op.outs = self._outs(result, aliases, keep=schema.is_mutable and not inplace_view)
        self._static.follow(op, is_random=random_op)

        self.recording.ops.append(op)
        return result

    # No function within a function: one that calls itself is a cycle, which would keep the whole recording for long.
    def _encoded(self, value: Any, function: Any, ins: list[int], aliases: dict[int, int]) -> Any:
        """Returns an argument with slots for tensors; adds these to `ins`, and their memory to `aliases`."""
        if isinstance(value, Tensor):
            slot = self.slot_of(value)
            if slot is None:
                slot = self._first_seen(function, value)
            ins.append(slot)
            if value.layout is torch.strided:
                aliases[_storage(value)] = self.recording.alias[slot]
            return Slot(slot)
        if isinstance(value, list | tuple):
            return [self._encoded(each, function, ins, aliases) for each in value]
        return value

    def _outs(self, result: Any, aliases: dict[int, int], *, keep: bool) -> list[int]:
        outs = []
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if not isinstance(tensor, Tensor):
                outs.append(-1)
                continue
            slot = self.slot_of(tensor) if keep else None
            if slot is None and tensor.layout is torch.strided:
                storage = _storage(tensor)
                slot = self.new_slot(tensor, aliases.get(storage, self._alias_of_storage.get(storage)))
            elif slot is None:
                self.refuse(f"an operation returns a tensor of layout {tensor.layout}")
                slot = self.new_slot(tensor)
            outs.append(slot)
        return outs

    def _first_seen(self, function: Any, tensor: Tensor) -> int:
        if function is not aten.lift_fresh.default:
            return self._foreign(tensor)

        # torch.tensor(...) makes its tensor unseen and lifts it into view: a constant, and its values are kept.
        slot = self._hold(tensor)
        with _disable_current_modes():
            self.recording.lifted[slot] = tensor.detach().clone()
        self._static.add(slot, frozenset())
        return slot

    def _look_at(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any], op: Op) -> None:
        """Refuses results that Python reads and shapes that follow from values; saves what may have to be undone."""
        # torch tags what cannot be replayed blindly. Indexing is tagged for the sake of masks alone, and masks that are
        # constants, as triangular matrices have them, are as good as integers.
        recording = self.recording
        tags = function.tags
        reads = torch.Tag.data_dependent_output in tags
        sizes = torch.Tag.dynamic_output_shape in tags
        decisive = op.ins
        if function is aten.index.Tensor:  # x[mask]: its size follows from the mask alone
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            decisive = [slot for mask in masks if (slot := self.slot_of(mask)) is not None]
            sizes = bool(masks)

        if reads or sizes:
            what = "the size of a result" if sizes else str(function)
            for slot in dict.fromkeys(decisive):
                if slot not in self._static:
                    self.refuse(f"{what} follows from values that differ from step to step ({function})")
                for source in self._static.sources.get(slot, ()):
                    if source not in recording.compared:
                        self._compare(source)

        if function._schema.name in _OTHER_MEMORY:
            self.refuse(f"a tensor gets other memory ({function})")

        # Offsets within an argument's memory differ between slices of one data set, and as_strided has absolute ones.
        if function in (aten.as_strided.default, aten.as_strided_.default) and op.args[0].index < recording.num_inputs:
            self.refuse("as_strided counts from the start of an argument's memory")
        for slot in op.writes:
            self._before_write(recording.alias[slot])

    def _before_write(self, alias: int) -> None:
        """Keeps what a foreign tensor held before its first write in the step."""
        recording = self.recording
        if alias < recording.num_params:
            self.refuse("the step writes to a parameter in place")
        elif self.first_argument <= alias < recording.num_inputs:
            self.refuse("the step writes to one of its arguments in place")
        elif alias in recording.foreign and alias not in self.undo:
            tensor = recording.foreign[alias]
            with _disable_current_modes(), torch.no_grad():
                memory = tensor.detach().as_strided((_storage_numel(tensor),), (1,), 0)
                self.undo[alias] = (memory, memory.clone())

    # Python code within the step.

    def host(self, name: str, function: Callable[..., None], *tensors: Tensor) -> None:
        """Calls `function(*tensors)` now, unrecorded, and again in each captured step."""
        slots = [slot for tensor in tensors if (slot := self.slot_of(tensor)) is not None]
        assert len(slots) == len(tensors), "a host call takes tensors of the recorded step"
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            self._check_generator()
            function(*tensors)
            self._generator_states = generator_states()
        call = HostCall(name, function)
        self.recording.ops.append(Op(call, [Slot(slot) for slot in slots], {}, [], slots, [], model_line()))

    def _check_generator(self) -> None:
        """Refuses a step that moves the generator by other means than recorded operations, such as seeding it."""
        states = generator_states()
        if self._generator_states is not None and not same_states(states, self._generator_states):
            self.refuse("torch's generator is seeded or set within the step")
        self._generator_states = states

    def start(self) -> None:
        """Notes where torch's generator stands."""
        self._generator_states = generator_states()

    def undo_writes(self) -> None:
        """Gives foreign tensors the values that they had before the step."""
        with torch.no_grad():
            for tensor, values in self.undo.values():
                tensor.copy_(values)

    def close(self) -> None:
        """Forgets the slots of tensors that live on."""
        self._check_generator()
        for tensor in self._tagged:
            if hasattr(tensor, self._attribute):
                delattr(tensor, self._attribute)


class _UncompiledRecorder(Recorder):  # type: ignore[no-untyped-call]
    """A recorder beside a model that has compiled code: the compiler must not compile the recorder itself."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # torch keeps its compiler off the functions that a class defines itself.
        return Recorder.__torch_dispatch__(self, function, types, args, kwargs)


def make_recorder() -> Recorder:
    """Returns a recorder for a step."""
    return _UncompiledRecorder() if "torch._dynamo" in sys.modules else Recorder()


@functools.cache
def _view_of_same_arguments(function: Any) -> Any:
    """Returns the operator of the same arguments that makes a view instead of changing its argument into one."""
    types = [str(argument.type) for argument in function._schema.arguments]
    packet = getattr(aten, function._schema.name.split("::")[1].rstrip("_"))
    overloads = (getattr(packet, name) for name in packet.overloads())
    for overload in overloads:
        if [str(argument.type) for argument in overload._schema.arguments] == types:
            return overload
    raise NotImplementedError(f"{function} has no form that leaves its argument as it is")


def _are_disjoint(tensors: list[Tensor]) -> bool:
    spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors if each.numel())
    separate = all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    return separate and all(each.is_contiguous() for each in tensors)


def _unsupported(tensor: Tensor) -> str | None:
    """Returns why no program can use a tensor, None where it can."""
    if tensor.is_neg():  # direct arithmetic reads its memory
        return "a tensor is used whose values are the negatives of its memory's, as of x.conj().imag"
    device = tensor.device
    if device.type == "cpu" or (device.type == "cuda" and device.index == torch.cuda.current_device()):
        return None
    return f"a tensor on {device} is used, and steps are captured on the CPU or the current GPU"


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _storage_numel(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


# Operators that write to running statistics although their schema does not say so: by name, the arguments' positions.
_UNDECLARED_WRITES = {
    "aten::native_batch_norm": (3, 4),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm_update_stats": (1, 2),
}


@functools.cache
def _write_positions(function: Any) -> tuple[tuple[int, str], ...]:
    """Returns position and name of each argument that an operator writes to."""
    schema = function._schema
    undeclared = _UNDECLARED_WRITES.get(schema.name, ())
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if position in undeclared or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def _written_slots(op: Op) -> list[int]:
    writes = []
    for position, name in _write_positions(op.function):
        value = op.args[position] if position < len(op.args) else op.kwargs.get(name)
        writes += [each.index for each in (value if isinstance(value, list) else [value]) if isinstance(each, Slot)]
    return writes

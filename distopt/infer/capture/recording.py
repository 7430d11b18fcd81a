"""What a recorded step is made of: operations, the tensors between them, and what the host read from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor among an operation's arguments: the tensor's number within the recording."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


class TensorInfo(NamedTuple):
    """What a tensor's result depends on besides its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    device: torch.device
    is_conj: bool = False
    is_neg: bool = False

    @property
    def has_default_strides(self) -> bool:
        """Whether it has the strides of a new tensor, also in dimensions of one element: kernels may ask for these."""
        return self.stride == torch.empty(self.shape, device="meta").stride()

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """Returns the description of `tensor`."""
        stride = tensor.stride() if tensor.layout is torch.strided else ()
        return cls(tuple(tensor.shape), tensor.dtype, stride, tensor.device, tensor.is_conj(), tensor.is_neg())


@dataclass(frozen=True, slots=True)
class HostCall:
    """Python code within a recorded step that is called again in each captured step, such as seeding a generator.

    Attributes:
        name: What a message calls it.
        function: The code.
        only_starts_kernels: Whether it does nothing but start kernels on a GPU, as a CUDA graph can hold.
    """

    name: str
    function: Callable[..., Any]
    only_starts_kernels: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class PackCall(HostCall):
    """Copies the tensors that it is given side by side into `flat`, which stays where it is."""

    flat: Tensor


Function: TypeAlias = Any  # torch._ops.OpOverload or HostCall
Argument: TypeAlias = Any  # Slot, list of arguments, or a constant


@dataclass(slots=True)
class Op:
    """One operation: a function, its arguments, the slots of its results, and the slots that it writes to in place."""

    function: Function
    args: list[Argument]
    kwargs: dict[str, Argument]
    outs: list[int]  # -1: a result that is no tensor
    ins: list[int]
    writes: list[int]
    line: str

    @property
    def is_host(self) -> bool:
        """Returns whether Python runs it."""
        return isinstance(self.function, HostCall)

    @property
    def is_random(self) -> bool:
        """Returns whether it draws from a generator."""
        return not self.is_host and is_random(self.function)

    @property
    def is_pure(self) -> bool:
        """Returns whether equal arguments give equal results, and nothing else happens."""
        return not (self.is_host or self.writes or self.is_random or self.function in UNINITIALIZED)

    def describe(self) -> str:
        """Returns the operation's name and the line of the model that asked for it."""
        name = self.function.name if self.is_host else str(self.function)
        return f"{name} at {self.line}" if self.line else name


aten = torch.ops.aten

# Their values are whatever the memory held: two of them are never equal, and none is a constant.
UNINITIALIZED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


@functools.cache
def is_random(function: Function) -> bool:
    """Returns whether an operator draws from a generator."""
    return torch.Tag.nondeterministic_seeded in function.tags or any(
        str(argument.type) == "Optional[Generator]" for argument in function._schema.arguments
    )


def slots_in(argument: Argument) -> Iterator[int]:
    """Yields the slots within an argument, in order."""
    if isinstance(argument, Slot):
        yield argument.index
    elif isinstance(argument, list):
        for each in argument:
            yield from slots_in(each)


def substitute(argument: Argument, replace: Callable[[int], Any]) -> Argument:
    """Returns the argument with `replace(index)` where a slot stood."""
    if isinstance(argument, Slot):
        return replace(argument.index)
    if isinstance(argument, list):
        return [substitute(each, replace) for each in argument]
    return argument


@dataclass(frozen=True, slots=True)
class Check:
    """A bool that the step's Python code read: the captured step computes it again, and must get the same answer."""

    slot: int
    answer: bool
    line: str


@dataclass(slots=True)
class Recording:
    """A step as a list of operations.

    Attributes:
        ops: In the order in which they ran.
        infos: By slot, what the tensor looks like.
        alias: By slot, the first slot with the same memory.
        num_inputs: Slots [0, num_inputs) are the parameters, then the gradients that they had, then the arguments.
        num_params: How many of them are parameters.
        requires_grad: Per parameter, whether it required a gradient.
        with_grad: Indices of the parameters that had a gradient before the step.
        lifted: Tensors that were made from Python numbers, by slot: copies of their values.
        foreign: Tensors that existed before the step and are neither parameters nor arguments, by slot.
        compared: Slots of foreign tensors whose values Python code read: copies of their values.
        checks: Bools that Python code read.
        losses: Slot, or number, of each loss; a tuple loss has several.
        loss_type: The type of a tuple loss, None for a single one.
        grads: Per parameter, the slot of its new gradient, -1 for none.
        accumulated: By parameter that had a gradient, the slot of what is added to it at the end of the step.
        used_params: Indices of the parameters that the step named, as Pyro's SVI collects them.
        refusal: Why the step cannot be captured, None if it can.
        transient: Whether another step may be captured nevertheless.
    """

    ops: list[Op] = field(default_factory=list)
    infos: list[TensorInfo] = field(default_factory=list)
    alias: list[int] = field(default_factory=list)
    num_inputs: int = 0
    num_params: int = 0
    requires_grad: list[bool] = field(default_factory=list)
    with_grad: list[int] = field(default_factory=list)
    lifted: dict[int, Tensor] = field(default_factory=dict)
    foreign: dict[int, Tensor] = field(default_factory=dict)
    compared: dict[int, Tensor] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    losses: list[Slot | float] = field(default_factory=list)
    loss_type: Any = None
    grads: list[int] = field(default_factory=list)
    accumulated: dict[int, int] = field(default_factory=dict)
    used_params: list[int] = field(default_factory=list)
    refusal: str | None = None
    transient: bool = False

    def loss_slots(self) -> list[int]:
        """Returns the slots of the losses that are tensors."""
        return [loss.index for loss in self.losses if isinstance(loss, Slot)]

    def outputs(self) -> list[int]:
        """Returns the slots that a captured step must compute."""
        grads = (slot for slot in (*self.grads, *self.accumulated.values()) if slot >= 0)
        return [*self.loss_slots(), *grads, *(check.slot for check in self.checks)]

    def written(self) -> set[int]:
        """Returns the alias classes that some operation writes to in place."""
        return {self.alias[slot] for op in self.ops for slot in op.writes}


def difference(a: Recording, b: Recording) -> str | None:
    """Returns where two recordings differ, with operation and line; None where both are the same step.

    Answers of checks are not compared: another answer takes another branch, which shows in the operations.
    """
    # The first difference is the one that explains the others: all slots behind it are shifted.
    for op_a, op_b in zip(a.ops, b.ops, strict=False):
        if op_a.function != op_b.function or op_a.outs != op_b.outs or op_a.writes != op_b.writes:
            return f"{op_a.describe()} in one step, {op_b.describe()} in another"
        if not _same_arguments(op_a, op_b):
            return f"{op_a.describe()} has other arguments from step to step: {op_a.args} and {op_b.args}"
    if len(a.ops) != len(b.ops):
        longer = a if len(a.ops) > len(b.ops) else b
        return f"{longer.ops[min(len(a.ops), len(b.ops))].describe()} in one step only"
    return _other_difference(a, b)


def _other_difference(a: Recording, b: Recording) -> str | None:
    # Outside tensors are compared by identity: one that is new in each step may hold anything in the next one. Tensors
    # that are made from Python numbers are new in each step as well, and are compared by their bytes.
    if a.infos != b.infos or a.alias != b.alias:
        return "the shapes of tensors differ from step to step"
    for slot in sorted(a.foreign.keys() | b.foreign.keys()):
        if a.foreign.get(slot) is not b.foreign.get(slot):
            return f"a tensor of shape {a.infos[slot].shape} that {_first_use(a, slot)} reads is another one each step"
    for slot in sorted(a.lifted.keys() | b.lifted.keys()):
        if slot not in a.lifted or slot not in b.lifted or not same_bits(a.lifted[slot], b.lifted[slot]):
            return f"a tensor made from Python numbers differs from step to step, {_first_use(a, slot)}"
    for slot in sorted(a.compared.keys() | b.compared.keys()):
        if slot not in a.compared or slot not in b.compared or not same_bits(a.compared[slot], b.compared[slot]):
            return f"a value read from a tensor differs from step to step, {_first_use(a, slot)}"
    if (repr(a.losses), a.grads, a.used_params) != (repr(b.losses), b.grads, b.used_params):
        return "losses or gradients come from other operations from step to step"
    if [check.slot for check in a.checks] != [check.slot for check in b.checks]:
        return "branches are taken on other values from step to step"
    return None


def _first_use(recording: Recording, slot: int) -> str:
    return next((op.describe() for op in recording.ops if slot in op.ins), "no operation")


def _same_arguments(a: Op, b: Op) -> bool:
    # repr tells 1 from 1.0 from True, -0.0 from 0.0, and every float from every other one; NaN equals NaN.
    return repr(a.args) == repr(b.args) and repr(a.kwargs) == repr(b.kwargs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors are equal in shape, dtype and every byte."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(packed_bytes(a), packed_bytes(b))


def packed_bytes(tensor: Tensor) -> Tensor:
    """Returns a tensor's elements as bytes, in order; a copy, since one element may have any stride."""
    packed = tensor.detach().clone(memory_format=torch.contiguous_format)
    return packed.view(-1).view(torch.uint8)

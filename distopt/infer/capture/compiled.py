"""A shortened recording with one function in the place of its arithmetic, which torch's compiler inductor has made.

Draws from the generator stay operations of the recording, in their order and with their bits: what they depend on must
not be computed from parameters or arguments. All other operations become a graph with the small parameters in one flat
tensor, the small gradients in another, and are compiled. Sums are then taken in another order and intermediate results
are not rounded where eager ones are, so that the bits differ from an eager step's, by as much as its own error.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import logging
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from distopt.infer.capture import program as programs
from distopt.infer.capture.captured_step import CapturedStep, StepResult, Variant
from distopt.infer.capture.cuda_graph import uses_gpu
from distopt.infer.capture.generators import generator_states, set_generator_states
from distopt.infer.capture.program import Program
from distopt.infer.capture.recorded_step import RecordedStep
from distopt.infer.capture.recorder import make_recorder
from distopt.infer.capture.recording import HostCall, Op, PackCall, Recording, Slot, TensorInfo, aten, substitute
from distopt.infer.capture.step import MAX_MISSES, StepCapture

logger = logging.getLogger(__name__)

MAX_PACKED_NUMEL = 4096
"""Parameters and gradients up to this size lie side by side in one tensor: a kernel's argument costs as much as many
elements, and copying larger ones costs more than an argument."""

_SAFETY = 16.0
"""How many times the rounding error that is expected of a sum a compiled step may differ from the recorded one; one of
23 sites and 8,192 rows differs by a twentieth of that error."""

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
        key, function = _compile(plan.graph, plan.examples)
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
    for info in recording.infos:
        if info.device.type != "cpu" or info.dtype.is_complex:
            raise NotCompiledError(f"there is a tensor of {info.dtype} on {info.device}")


def _split(recording: Recording) -> tuple[list[Op], list[Op]]:
    """Returns the operations that draws consist of, and all others."""
    early = set(recording.lifted)
    draws: list[Op] = []
    body: list[Op] = []
    used: set[int] = set()  # memory that the body has read
    for op in recording.ops:
        op = _without_argument(op, recording)
        if all(slot in early for slot in op.ins):
            if any(recording.alias[slot] in used for slot in op.writes):
                raise NotCompiledError(f"a random number is overwritten, {op.describe()}")
            draws.append(op)
            early.update(op.outs)
            continue
        if op.is_random:
            raise NotCompiledError(f"a random number is drawn that depends on computed values, {op.describe()}")
        if any(slot in early for slot in op.writes):
            raise NotCompiledError(f"a random number is changed in place, {op.describe()}")
        body.append(op)
        used.update(recording.alias[slot] for slot in op.ins)
    if not body:
        raise NotCompiledError("nothing is computed")
    return draws, body


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
        made = {slot for op in body for slot in op.outs}
        # In the order of parameters, whether a step leaves gradients or adds to those that are there: it is one list.
        grads = [recording.accumulated.get(index, slot) for index, slot in enumerate(recording.grads)]
        self._results = [slot for slot in dict.fromkeys((*recording.loss_slots(), *grads)) if slot in made]
        needed = dict.fromkeys(slot for op in body for slot in op.ins if slot not in made)

        drawn = {slot for op in draws for slot in op.outs}
        self._packed_inputs = self._pack(slot for slot in needed if self._is_packed(slot, drawn))
        packed = {slot for pack in self._packed_inputs for slot in pack.slots}
        self._inlined = [slot for slot in needed if slot in recording.lifted and not recording.infos[slot].shape]
        self._inputs = [slot for slot in needed if slot not in packed and slot not in self._inlined]

        self._packed_results = self._pack(slot for slot in self._results if slot in grads and self._is_small(slot))
        packed = {slot for pack in self._packed_results for slot in pack.slots}
        self._single_results = [slot for slot in self._results if slot not in packed]

        self.examples: list[Tensor] = []
        self.graph = self._make_graph(body)

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
            flat = self._input(graph, TensorInfo((pack.numel,), pack.dtype, (1,), torch.device("cpu")))
            for slot, offset in zip(pack.slots, pack.offsets, strict=True):
                shape = list(infos[slot].shape)
                segment = graph.call_function(aten.slice.Tensor, (flat, 0, offset, offset + math.prod(shape)))
                nodes[slot] = graph.call_function(aten.view.default, (segment, shape))
        for slot in self._inputs:
            nodes[slot] = self._input(graph, infos[slot])
        for slot in self._inlined:
            value = self._recording.lifted[slot]
            kwargs: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            nodes[slot] = graph.call_function(aten.full.default, ([], value.item()), kwargs)

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
        args = tuple(substitute(argument, nodes.__getitem__) for argument in op.args)
        kwargs = {name: substitute(argument, nodes.__getitem__) for name, argument in op.kwargs.items()}
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

    # Around the function.

    def recording(self, function: Callable[..., Any]) -> Recording:
        """Returns the step with the compiled function in the place of the graph."""
        old = self._recording
        new = copy.copy(old)
        new.ops = list(self._draws)
        new.lifted = dict(old.lifted)
        flats = []
        for pack in self._packed_inputs:
            flat = torch.zeros(pack.numel, dtype=pack.dtype)
            flats.append(flat)
            call = PackCall("packing of inputs", _packer(list(pack.views(flat, old.infos))), flat)
            new.ops.append(Op(call, [Slot(slot) for slot in pack.slots], {}, [], list(pack.slots), [], ""))

        # Results that lie side by side are copied to memory that stays, of which the gradients are views.
        fixed = []
        for pack in self._packed_results:
            flat = torch.zeros(pack.numel, dtype=pack.dtype)
            fixed.append(flat)
            new.lifted.update(zip(pack.slots, pack.views(flat, old.infos), strict=True))
        call_all = HostCall("the compiled step", _Call(function, flats, fixed))
        inputs = [Slot(slot) for slot in self._inputs]
        new.ops.append(Op(call_all, inputs, {}, self._single_results, self._inputs, [], ""))
        return new


def _getitem(values: Any, index: int) -> Any:
    return values[index]


def _packer(views: list[Tensor]) -> Callable[..., None]:
    def pack(*tensors: Tensor) -> None:
        for view, tensor in zip(views, tensors, strict=True):
            view.copy_(tensor)

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


# The compiler.

_functions: dict[str, Callable[..., Any]] = {}  # by key: a list that is met twice in a process is compiled once


def _compile(graph: fx.GraphModule, examples: list[Tensor]) -> tuple[str, Callable[..., Any]]:
    key = _key(graph, examples)
    if key not in _functions:
        with _lock(key):
            _functions[key] = _run_compiler(graph, examples)
    return key, _functions[key]


def _key(graph: fx.GraphModule, examples: list[Tensor]) -> str:
    """Returns a hash of all that the bits of a compiled function depend on."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    shapes = [tuple(TensorInfo.of(example)) for example in examples]
    nodes = [(node.op, node.name, str(node.target), str(node.args), str(node.kwargs)) for node in graph.graph.nodes]
    machine = (torch.__version__, get_cpp_compiler(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    return hashlib.sha256(repr((nodes, shapes, machine)).encode()).hexdigest()[:16]


def _run_compiler(graph: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
    import torch._inductor.config as config

    # Compiled in this process: pools of processes would outlive it. Threads are part of the compiled code.
    options = {
        "fallback_random": True,
        "compile_threads": 1,
        "cpp.threads": torch.get_num_threads(),
        "fx_graph_cache": True,
        "size_asserts": False,  # the program has looked at all of them
    }
    with config.patch(options), torch.no_grad(), warnings.catch_warnings(), _keeping_environment():
        warnings.simplefilter("ignore")  # of torch about itself
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        # Without an environment for shapes the compiler passes its cache by.
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        with tracing(TracingContext(mode)):
            function: Any = compile_fx(graph, examples)
            return function  # type: ignore[no-any-return]  # torch leaves open what it takes


@contextmanager
def _keeping_environment() -> Iterator[None]:
    """Takes back what the compiler tells the libraries that it loads: processes that start later are not meant."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@contextmanager
def _lock(key: str) -> Iterator[None]:
    """Lets one process of a host compile a list, while the others wait for what it leaves in the compiler's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # A file of another user's, or a file system without locks: then each process compiles by itself.
    with ExitStack() as stack:
        try:
            folder = Path(cache_dir())
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(os.fspath(folder / f"distopt-{key}.lock"), "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("compiling without a lock: %s", error)
        else:
            # Not left to closing it: a process that was forked meanwhile has the same file open.
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
        yield


# Steps.


class CompiledCapture(StepCapture):
    """Takes steps by compiled programs, from the first one on that creates no parameter.

    A compiled step has not the bits of an eager one. For a run that resumes to have those of a run that was never
    stopped, which steps are compiled must not follow from when the process began. So steps are recorded in rehearsal:
    generators, gradients and whatever the step has written to are put back, and then the step is taken by the program.

    A list that cannot be compiled runs as `StepCapture` runs it, and `notice` says why.

    Args:
        loss_and_grads: The method of a `pyro.infer.ELBO` instance.
    """

    def __init__(self, loss_and_grads: Callable[..., Any]) -> None:
        super().__init__(loss_and_grads)
        self._build = self._build_compiled
        self._undo: Callable[[], None] | None = None
        self._plain: Program | None = None  # the program of a list that was compiled just now, as it was before

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> StepResult:
        """As `StepCapture` does."""
        if self.num_steps == 0 and self.refusal is None:
            rehearsal = _Rehearsal()
            names = list(pyro.get_param_store()._params)
            writes = make_recorder()  # which knows what the step writes to; what else it records is of no use
            try:
                with writes:
                    result = self._eager(model, guide, self._rows_or_args(args), kwargs)
            finally:
                writes.close()
            self.num_steps = 1
            if list(pyro.get_param_store()._params) != names:
                return result
            rehearsal.undo(writes.undo_writes)
        return super().__call__(model, guide, *args, **kwargs)

    def _pause(self, reason: str) -> None:
        # Which steps are compiled again would follow from when the process began.
        self._refuse(reason)

    def _take_recorded(self, *step: Any) -> RecordedStep | None:
        recorded = super()._take_recorded(*step)
        self._undo = None if recorded is None else recorded.undo_writes
        return recorded

    def _record(
        self, variant: Variant, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepResult:
        num_programs = len(variant.captured)
        rehearsal = _Rehearsal()
        for _ in range(2 * MAX_MISSES):
            num_recorded = self.num_recorded
            rehearsed = super()._record(variant, model, guide, args, kwargs)
            if self._undo is None:  # the recording failed, so that the step was taken eagerly: it is no rehearsal
                return rehearsed
            gradients = _gradients(rehearsed.params)
            state = torch.get_rng_state()
            rehearsal.undo(self._undo)
            if self.refusal is not None or len(variant.captured) > num_programs or self.num_recorded == num_recorded:
                break
        if self.refusal is not None or len(variant.captured) == num_programs:
            return self._eager(model, guide, args, kwargs)

        captured = variant.captured[-1]
        result = self._try(captured, args, kwargs)
        if result is not None and self._plain is not None:
            tolerance = Tolerance.of(captured.recording)
            same = torch.equal(torch.get_rng_state(), state) and _are_close(result, rehearsed, gradients, tolerance)
            if not same:
                self._note("a compiled step is not the recorded one")
                captured.program = self._plain
                self.num_captured -= 1
                rehearsal.undo()
                result = self._try(captured, args, kwargs)
        self._plain = None
        return result if result is not None else self._eager(model, guide, args, kwargs)

    def _try(self, captured: CapturedStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepResult | None:
        tensors = list(dict.fromkeys(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        _, result = captured.run(pyro.get_param_store()._params, tensors, self._buffers)
        self.num_captured += result is not None
        return result

    def _compare(
        self, variant: Variant, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepResult:
        rehearsal = _Rehearsal()
        result = super()._compare(variant, model, guide, args, kwargs)
        if self._undo is None:  # as in `_record`
            return result
        rehearsal.undo(self._undo)
        if self.refusal is not None:
            return self._eager(model, guide, args, kwargs)
        tensors = list(dict.fromkeys(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        return self._run(variant, tensors, model, guide, args, kwargs)

    def _build_compiled(self, short: Recording, params: list[Tensor], tensors: list[Tensor]) -> Program:
        plain = programs.build(short, params, tensors)
        try:
            fused = fuse(short, params)
        except NotCompiledError as error:
            self._note(str(error))
            return plain
        self._plain = plain
        self.keys.append(fused.key)
        logger.info("compiled a step in %.1f s", fused.compile_s)
        return programs.build(fused.recording, params, tensors)

    def _capture(self, variant: Variant, *step: Any) -> None:
        super()._capture(variant, *step)
        if variant.captured and self.refusal is None and uses_gpu(variant.captured[-1].short):
            self._note("the step runs on a GPU, as one CUDA graph")

    def _note(self, reason: str) -> None:
        if self.notice is None:
            self.notice = reason
            logger.info("steps are captured, but not compiled: %s", reason)


class _Rehearsal:
    """What a step changes, to be put back."""

    def __init__(self) -> None:
        self._torch = generator_states()
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        params = pyro.get_param_store()._params.values()
        self._grads = [(param, param.grad, None if param.grad is None else param.grad.clone()) for param in params]

    def undo(self, undo_writes: Callable[[], None] | None = None) -> None:
        """Puts everything back; tensors that the step has written to by `undo_writes`."""
        set_generator_states(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        for param, grad, values in self._grads:
            param.grad = grad if grad is None else grad.copy_(values)
        if undo_writes is not None:
            undo_writes()


def _gradients(params: list[Tensor]) -> list[Tensor | None]:
    return [None if param.grad is None else param.grad.clone() for param in params]


class Tolerance(NamedTuple):
    """By how much a compiled step may differ from the recorded one.

    A sum of n terms in another order differs by about eps sqrt(n) times its size, as a random walk of n roundings.
    Terms that cancel add the rounding of each, which for densities is eps.

    Attributes:
        relative: Of the size of a result.
        absolute: Of a loss, in nats.
    """

    relative: float
    absolute: float

    @classmethod
    def of(cls, recording: Recording) -> Tolerance:
        """Returns the one for a recording: n is the largest tensor's number of elements, eps the coarsest dtype's."""
        num_terms = max(math.prod(info.shape) for info in recording.infos)
        eps = max(torch.finfo(info.dtype).eps for info in recording.infos if info.dtype.is_floating_point)
        return cls(_SAFETY * eps * math.sqrt(num_terms), _SAFETY * eps * num_terms)


def _are_close(result: StepResult, rehearsed: StepResult, gradients: list[Tensor | None], tolerance: Tolerance) -> bool:
    """Returns whether a compiled step has computed the same as the recorded one, but for rounding."""
    losses = [each.loss if isinstance(each.loss, tuple) else (each.loss,) for each in (result, rehearsed)]
    limits = {"rel_tol": tolerance.relative, "abs_tol": tolerance.absolute}
    if not all(math.isclose(a, b, **limits) for a, b in zip(*losses, strict=True)):
        return False
    largest = max((float(each.abs().max()) for each in gradients if each is not None and each.numel()), default=0.0)
    for param, expected in zip(result.params, gradients, strict=True):
        if (param.grad is None) != (expected is None):
            return False
        if param.grad is None or expected is None or not expected.numel():
            continue
        error = float((param.grad - expected).abs().max())
        # Where a parameter's own terms cancel, what is left of them is small beside their roundings.
        if not error <= tolerance.relative * (float(expected.abs().max()) + largest):
            return False
    return True

"""Decides for each step whether it runs eagerly, is recorded, or is run by a program."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.infer.util import torch_item
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from distopt.infer.capture import program as programs
from distopt.infer.capture.assumptions import Assumptions
from distopt.infer.capture.captured_step import (
    FAILED,
    MAX_PROGRAMS,
    CapturedStep,
    Pauses,
    Pending,
    StepResult,
    Variant,
    other_branch,
    recorded_result,
)
from distopt.infer.capture.cuda_graph import NoGraphError, build_graph, uses_gpu
from distopt.infer.capture.passes import shorten
from distopt.infer.capture.recorded_step import CollectiveCalledError, NotFiniteError, RecordedStep, record_step
from distopt.infer.capture.recording import Recording, difference
from distopt.infer.capture.rehearsal import RehearsalWithViews
from distopt.infer.capture.rows import TensorRows
from distopt.infer.capture.step_arguments import Given, is_object, key_of, tensors_among
from distopt.infer.capture.watch import Watch, may_watch

logger = logging.getLogger(__name__)

MAX_MISSES = 3
"""Recordings in a row that may differ from each other before steps stay eager."""

_TOO_MANY = (
    f"more than {MAX_PROGRAMS} programs would be needed: shapes, plain arguments, objects given as arguments or values "
    "that the model reads keep changing"
)
_NOT_FINITE = "the loss is often not finite"
_FIRST_COMPARISON = 8
_COMPARISON_STEPS = 1000


class _Last(NamedTuple):
    """A call whose arguments were tensors, and what was found for it."""

    model: Any
    guide: Any
    num_args: int
    defaults: tuple[torch.dtype, torch.device | None]
    variant: Variant

    def fits(self, model: Any, guide: Any, args: tuple[Any, ...]) -> bool:
        """Returns whether the only program of that call may be asked whether it fits this one."""
        return (
            model is self.model
            and guide is self.guide
            and len(args) == self.num_args
            and len(set(map(id, args))) == self.num_args
            and all(type(each) is Tensor for each in args)
            and _default_type_and_device() == self.defaults
            and len(self.variant.captured) == 1
            and not self.variant.captured[0].recording.checks
        )


class StepCapture:
    """Computes losses and gradients as an ELBO's `loss_and_grads` does, recording a step and running the recording.

    The first step is eager, and the second and third are recorded while they run. When both recordings are the same
    list of operations, later steps run that list: without the model's and Pyro's Python code, and with the losses,
    gradients and random numbers of an eager step in every bit. Whatever the list takes for granted is looked at before
    each step: shapes and plain arguments, the parameter store, Pyro's handlers, and the plain values and `training`
    flags that the model's code read (see `assumptions`). Branches on values of tensors are computed again and compared;
    another answer takes an eager step. Steps 8, 16, 32, ..., 512 and every 1,000th are recorded again and compared.

    A step that cannot be captured stays eager, and `refusal` says why. While values that the model reads keep changing
    (annealing), steps are eager too, and recorded again after 8, 16, ... steps. Pyro does not validate recorded and
    captured steps, but one whose loss is not finite is taken again, eagerly and with the same random numbers.

    Args:
        loss_and_grads: The method of a `pyro.infer.ELBO` instance.
        direct: Whether small arithmetic is done by the C++ loop itself; off, it is all ATen's.

    Attributes:
        refusal: Why steps are eager; None while they need not be.
        notice: Likewise why steps that were to be compiled are not.
        keys: Of each compiled list, a hash of all that its bits depend on.
        num_steps: Steps so far, of which `num_captured` ran from a program and `num_recorded` were recorded.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 1.0).expand([3]).to_event(1), obs=data)
        >>> pyro.clear_param_store()
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> capture = StepCapture(pyro.infer.Trace_ELBO().loss_and_grads)
        >>> for _ in range(5):
        ...     loss, params = capture(model, guide, torch.ones(3))
        ...     pyro.infer.util.zero_grads(params)
        >>> capture.num_recorded, len(params)
        (2, 2)
    """

    def __init__(self, loss_and_grads: Callable[..., Any], *, direct: bool = True) -> None:
        self.loss_and_grads = loss_and_grads
        self.refusal: str | None = None
        self.notice: str | None = None
        self.keys: list[str] = []
        self.num_steps = 0
        self.num_captured = 0
        self.num_recorded = 0
        self._build: Callable[..., programs.Program] = partial(build_program, direct=direct)
        self._make_watch: Callable[[], Watch] = Watch
        self._variants: dict[Any, Variant] = {}
        self._num_programs = 0
        self._num_not_finite = 0  # recordings in vain
        self._pauses = Pauses()
        self._buffers: dict[int, Tensor] | None = None
        self._columns: tuple[Tensor, ...] | None = None  # whose rows a step selects
        self._last: _Last | None = None
        self._viewed: Any = None  # arguments that a rehearsal has seen, whose ids a model may know
        self._elbo = getattr(loss_and_grads, "__self__", None)
        if not isinstance(self._elbo, pyro.infer.ELBO) or type(self._elbo).__name__.startswith("Jit"):
            self._refuse("the loss is no method of a pyro.infer.ELBO, or one that traces by itself")

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> StepResult:
        """Takes a step: leaves gradients in the parameters' `.grad`, and returns the loss.

        Raises:
            Exception: Whatever an eager step raises, from an eager step.
        """
        # The first step is never recorded: in it guides set themselves up, and ELBOs find out how deep plates nest.
        self.num_steps += 1
        if self._pauses.is_over(self.num_steps):
            self.refusal = None
        args = self._rows_or_args(args)
        result = self._repeat(model, guide, args, kwargs)
        if result is not None:
            return result
        if self.num_steps == 1 or self.refusal is not None or not _is_plain_context() or not may_watch():
            return self._eager(model, guide, args, kwargs)
        key, tensors = key_of(model, guide, args, kwargs)
        if key is None:
            self._refuse(f"{tensors}, which cannot be compared from step to step")
            return self._eager(model, guide, args, kwargs)

        # Steps of one kind wait for a second one to be captured, so those that keep changing are no kinds.
        key = key, _default_type_and_device()
        if key not in self._variants and len(self._variants) >= MAX_PROGRAMS:
            self._pause(_TOO_MANY)
            return self._eager(model, guide, args, kwargs)
        variant = self._variants.setdefault(key, Variant())
        if not kwargs and len(tensors) == len(args):
            self._last = _Last(model, guide, len(args), _default_type_and_device(), variant)
        if variant.captured and _is_comparison_step(self.num_steps):
            return self._compare(variant, model, guide, args, kwargs)
        return self._run(variant, tensors, model, guide, args, kwargs)

    def use_gradient_buffers(self, buffers: dict[int, Tensor]) -> None:
        """Lets captured steps leave gradients in memory where they are wanted, instead of memory of their own.

        Args:
            buffers: By id of the parameter, a contiguous tensor of its shape and dtype, which each step overwrites.
        """
        self._buffers = buffers

    def _rows_or_args(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the row numbers where the step selects its rows itself: its columns are constants to it."""
        rows = args[0] if args and isinstance(args[0], TensorRows) else None
        columns = None if rows is None else rows.columns
        if _ids(columns) != _ids(self._columns):
            self._columns = columns
            self._variants.clear()
            self._last = None
        return args if rows is None else (rows.rows,)

    def _loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        selected = args if self._columns is None else TensorRows(self._columns, *args)
        return self.loss_and_grads(model, guide, *selected, **kwargs)

    # Steps of each kind.

    def _repeat(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepResult | None:
        """Runs the program of the step before, if that is all that there is to decide; None if it is not.

        The program looks at shapes and strides of its arguments itself, so that it is quicker to ask it than to look
        for the program of such arguments.
        """
        last = self._last
        if last is None or kwargs or self.refusal is not None or not last.fits(model, guide, args):
            return None
        if _is_comparison_step(self.num_steps) or not _is_plain_context():
            return None
        (captured,) = last.variant.captured
        status, result = captured.run(pyro.get_param_store()._params, list(args), self._buffers)
        if status == programs.NOT_FINITE:
            return self._take_not_finite(captured, model, guide, args, kwargs)
        self.num_captured += result is not None
        return result

    def _eager(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepResult:
        with poutine.trace(param_only=True) as capture:
            loss = self._loss_and_grads(model, guide, *args, **kwargs)
        params = list(dict.fromkeys(site["value"].unconstrained() for site in capture.trace.nodes.values()))
        return StepResult(type(loss)(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss), params)

    def _run(
        self,
        variant: Variant,
        tensors: list[Tensor],
        model: Any,
        guide: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> StepResult:
        """Runs the first program whose assumptions and checks hold; records the step where none is left."""
        store = pyro.get_param_store()._params
        failed: list[bool] = []  # of programs whose check has failed, whether it often does

        # A program that does not fit costs next to nothing: it looks at its inputs before it runs an operation. One
        # whose check fails has run in vain, and has put back what it changed.
        for captured in variant.captured:
            status, result = captured.run(store, tensors, self._buffers)
            self.num_captured += result is not None
            if result is not None:
                return result
            if status == FAILED:  # an eager step shows the error as the model's own
                result = self._eager(model, guide, args, kwargs)
                if captured.failures >= MAX_MISSES:
                    self._refuse(f"a captured step fails where an eager one does not: {captured.error}")
                return result
            if status == programs.NOT_FINITE:
                return self._take_not_finite(captured, model, guide, args, kwargs)
            if status >= 0:
                failed.append(captured.fails_often)

        is_full = self._num_programs >= MAX_PROGRAMS
        if is_full and not failed:
            self._pause(_TOO_MANY)
        if is_full or not all(failed):
            return self._eager(model, guide, args, kwargs)
        return self._record(variant, model, guide, args, kwargs)

    def _take_not_finite(self, captured: CapturedStep, *step: Any) -> StepResult:
        """Takes a step eagerly whose captured loss was not finite: Pyro's validation, if it is on, names the site."""
        if captured.fails_often:
            self._refuse(_NOT_FINITE)
        return self._eager(*step)

    def _record(
        self, variant: Variant, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepResult:
        """Records the step, and captures it if an earlier recording is equal."""
        held = variant.held()
        given = Given(args, kwargs)
        rehearsal = RehearsalWithViews(args, kwargs)
        with self._make_watch() as watch:
            step = self._take_recorded(model, guide, args, kwargs)
        if step is None:
            return self._eager(model, guide, args, kwargs)

        result = recorded_result(step)
        if watch.effects:
            self._refuse(f"the model calls {watch.effects[0]}, which a captured step would not")
            return result
        if given.has_changed():
            self._refuse("the model changes its arguments, which a captured step would not")
            return result
        if step.recording.refusal is not None:
            self._miss(variant, step.recording.refusal, is_final=not step.recording.transient)
            return result

        roots = {"elbo": self._elbo, "model": model, "guide": guide}
        objects = [*filter(is_object, tree_leaves((args, kwargs)))]
        pending, unlike = variant.match(step.recording, held)
        if pending is not None and unlike is None:
            assumptions = Assumptions(watch, roots, objects, pending.assumptions)
            reason = rehearsal.refusal(step, assumptions, self._loss_and_grads, model, guide)
            if reason is None:
                self._capture(variant, step, assumptions, tensors_among(args, kwargs))
            else:
                self._viewed = rehearsal.views
                self._refuse(reason)
            return result
        if unlike is not None:
            self._miss(variant, unlike)

        if not held and variant.num_changes == MAX_MISSES:
            self._pause(variant.pending[-1].change() or _TOO_MANY)
        elif not variant.keep(Pending(step.recording, Assumptions(watch, roots, objects)), held):
            self._refuse(f"branches on values take more than {MAX_PROGRAMS} ways, {step.recording.checks[0].line}")
        return result

    def _take_recorded(self, *arguments: Any) -> RecordedStep | None:
        try:
            step = record_step(self._loss_and_grads, *arguments)
        except NotFiniteError:
            self._num_not_finite += 1
            if self._num_not_finite >= MAX_PROGRAMS:
                self._refuse(_NOT_FINITE)
            return None
        except CollectiveCalledError as error:
            raise error.__cause__ or error  # noqa: B904  # as the model raised it, with its own cause
        except Exception as error:  # an eager step shows whether it is the model's own
            self._refuse(f"recording failed: {type(error).__name__}: {error}")
            return None
        self.num_recorded += 1
        return step

    def _capture(self, variant: Variant, step: RecordedStep, holds: Assumptions, tensors: list[Tensor]) -> None:
        try:
            short = shorten(step.recording)
            program = self._build(short, step.params, tensors)
        except Exception as error:  # the step itself has been taken
            why = "" if isinstance(error, NoGraphError) else f"no program can be built: {type(error).__name__}: "
            return self._refuse(f"{why}{error}")
        variant.captured.append(CapturedStep(program, step.recording, short, holds, step.used, step.params, tensors))
        self._num_programs += 1

    def _compare(
        self, variant: Variant, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepResult:
        """Records a step anew and compares it with the programs that would have run."""
        store, tensors = pyro.get_param_store()._params, tensors_among(args, kwargs)
        candidates = [captured for captured in variant.captured if captured.would_run(store, tensors)]
        step = self._take_recorded(model, guide, args, kwargs)
        if step is None:
            return self._eager(model, guide, args, kwargs)

        recording = step.recording
        if recording.refusal is not None and not recording.transient:
            self._refuse(recording.refusal)
            return recorded_result(step)

        # This step was a true one and is right whatever comes out. Programs that would not have run now, for another
        # branch or for values as they were earlier, are no party to the comparison.
        for captured in candidates:
            if other_branch(captured.recording, recording) or recording.transient:
                continue
            unlike = difference(captured.recording, recording)
            if unlike is not None:
                _warn_of_difference(self.num_steps, unlike)
                self._refuse(unlike)
                break
        return recorded_result(step)

    def _miss(self, variant: Variant, reason: str, *, is_final: bool = False) -> None:
        variant.misses += 1
        if is_final or variant.misses >= MAX_MISSES:
            self._refuse(reason)

    def _pause(self, reason: str) -> None:
        """Keeps steps eager for a while, until what changed from step to step may have settled."""
        self._refuse(f"{reason}; steps are recorded again after {self._pauses.begin(self.num_steps)} eager ones")
        self._num_programs = 0

    def _refuse(self, reason: str) -> None:
        """Keeps steps eager from here on, and says why once."""
        if self.refusal is not None:
            return
        self.refusal = reason
        self._last = None
        self._variants.clear()
        logger.info("steps are not captured and run eagerly: %s", reason)


def build_program(
    short: Recording, params: list[Tensor], tensors: list[Tensor], *, direct: bool = True
) -> programs.Program:
    """Returns the program of a shortened recording: a CUDA graph where it uses a GPU.

    Args:
        short: The recording, which is not refused.
        params: The parameters of the store at that time.
        tensors: The tensors among the arguments at that time.
        direct: Whether small arithmetic is done by the C++ loop itself.

    Raises:
        NoGraphError: It uses a GPU and cannot be a CUDA graph.
    """
    if uses_gpu(short):
        return build_graph(short, params, tensors)
    return programs.build(short, params, tensors, direct=direct)


def _warn_of_difference(step: int, difference: str) -> None:
    logger.warning(
        "step %d was recorded again and is not the captured one: %s. Steps since the last comparison may have used "
        "outdated values; from here on they run eagerly.",
        step,
        difference,
    )


def _ids(columns: tuple[Tensor, ...] | None) -> list[int] | None:
    return None if columns is None else list(map(id, columns))


def _is_comparison_step(step: int) -> bool:
    if step >= _COMPARISON_STEPS:
        return step % _COMPARISON_STEPS == 0
    return step >= _FIRST_COMPARISON and step & (step - 1) == 0


def _is_plain_context() -> bool:
    """Returns whether the step runs under no handler, mode or setting that a program would not see."""
    return (
        not _PYRO_STACK
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not torch.is_anomaly_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and torch._C._len_torch_function_stack() == (_default_device() is not None)
        and torch.get_default_dtype() in (torch.float32, torch.float64)
    )


def _default_device() -> torch.device | None:
    """Returns what `torch.set_default_device` was given, None where it was not called or other modes lie above it."""
    if torch._C._len_torch_function_stack() == 0:
        return None
    mode = _get_current_function_mode()  # type: ignore[no-untyped-call]
    device: torch.device | None = mode.device if isinstance(mode, DeviceContext) else None
    return device


def _default_type_and_device() -> tuple[torch.dtype, torch.device | None]:
    return torch.get_default_dtype(), _default_device()

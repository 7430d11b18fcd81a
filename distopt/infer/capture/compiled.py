"""Takes steps by compiled programs, so that a run that resumes has the bits of one that was never stopped."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from distopt.infer.capture.captured_step import CapturedStep, StepResult, Variant
from distopt.infer.capture.cuda_graph import NoGraphError
from distopt.infer.capture.fusion import NotCompiledError, fuse
from distopt.infer.capture.generators import generator_states, same_states
from distopt.infer.capture.program import Program
from distopt.infer.capture.python_state import PythonState
from distopt.infer.capture.recorded_step import RecordedStep, noting_collectives
from distopt.infer.capture.recorder import make_recorder
from distopt.infer.capture.recording import Recording
from distopt.infer.capture.rehearsal import Rehearsal
from distopt.infer.capture.step import MAX_MISSES, StepCapture, build_program
from distopt.infer.capture.step_arguments import tensors_among
from distopt.infer.capture.watch import Watch, may_watch

logger = logging.getLogger(__name__)

_SAFETY = 16.0
"""How many times the rounding error that is expected of a sum a compiled step may differ from the recorded one; one of
23 sites and 8,192 rows differs by a twentieth of that error."""


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
        self._make_watch = self._watch_state
        self._is_rehearsed = False
        self._states: list[PythonState] = []  # before each rehearsal since the last step that counts
        self._undo: Callable[[], None] | None = None
        self._plain: Program | None = None  # the program of a list that was compiled just now, as it was before

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> StepResult:
        """As `StepCapture` does."""
        if not self._is_rehearsed and self.refusal is None and may_watch():
            result = self._rehearse(model, guide, self._rows_or_args(args), kwargs)
            if result is not None:
                return result
        return super().__call__(model, guide, *args, **kwargs)

    def _rehearse(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepResult | None:
        """Takes the first step that creates no parameter, and undoes it; returns it where it is to stand."""
        rehearsal = Rehearsal()
        names = list(pyro.get_param_store()._params)
        writes = make_recorder()  # which knows what the step writes to; what else it records is of no use
        collectives: list[str] = []
        try:
            with writes, self._make_watch() as watch, noting_collectives(collectives):
                result = super()._eager(model, guide, args, kwargs)
        except Exception as error:  # an eager step shows whether it is the model's own
            if collectives:  # which only this rank would call again
                raise
            rehearsal.undo(writes.undo_writes)
            self._refuse(f"recording failed: {type(error).__name__}: {error}")
            return None
        finally:
            writes.close()
        self.num_steps = max(1, self.num_steps)
        if list(pyro.get_param_store()._params) != names:
            self._states.clear()
            return result
        self._is_rehearsed = True
        if collectives:
            self._refuse(collectives[0])
            self._states.clear()
            return result
        lasting = [f"calls {each}" for each in watch.effects] + [f"uses {each}" for each in self._states[-1].passing()]
        if lasting:
            self._refuse(f"the model {lasting[0]}, which a compiled step would not")
            self._states.clear()
            return result
        rehearsal.undo(writes.undo_writes)
        return None

    # What rehearsals have changed in Python is put back before a step that counts runs in Python. Where none does, and
    # the list runs, it stays: it is what the model has kept for its next calls.

    def _watch_state(self) -> Watch:
        self._states.append(PythonState())
        return Watch(self._states[-1])

    def _eager(self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepResult:
        while self._states:
            self._states.pop().put_back()
        return super()._eager(model, guide, args, kwargs)

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
        rehearsal = Rehearsal()
        for _ in range(2 * MAX_MISSES):
            num_recorded = self.num_recorded
            rehearsed = super()._record(variant, model, guide, args, kwargs)
            if self._undo is None:  # the recording failed, so that the step was taken eagerly: it is no rehearsal
                return rehearsed
            if self.refusal is not None and len(self._states) == 1:  # the only one: it has the bits of an eager step
                self._states.clear()
                return rehearsed
            gradients = _gradients(rehearsed.params)
            states = generator_states()
            rehearsal.undo(self._undo)
            if self.refusal is not None or len(variant.captured) > num_programs or self.num_recorded == num_recorded:
                break
        if self.refusal is not None or len(variant.captured) == num_programs:
            return self._eager(model, guide, args, kwargs)

        self._states.clear()
        captured = variant.captured[-1]
        result = self._try(captured, args, kwargs)
        if result is not None and self._plain is not None:
            tolerance = Tolerance.of(captured.recording)
            same = same_states(generator_states(), states) and _are_close(result, rehearsed, gradients, tolerance)
            if not same:
                self._note("a compiled step is not the recorded one")
                captured.program = self._plain
                self.num_captured -= 1
                rehearsal.undo()
                result = self._try(captured, args, kwargs)
        self._plain = None
        return result if result is not None else self._eager(model, guide, args, kwargs)

    def _try(self, captured: CapturedStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepResult | None:
        tensors = tensors_among(args, kwargs)
        _, result = captured.run(pyro.get_param_store()._params, tensors, self._buffers)
        self.num_captured += result is not None
        return result

    def _compare(
        self, variant: Variant, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StepResult:
        rehearsal = Rehearsal()
        result = super()._compare(variant, model, guide, args, kwargs)
        if self._undo is None:  # as in `_record`
            return result
        rehearsal.undo(self._undo)
        if self.refusal is not None:
            return self._eager(model, guide, args, kwargs)
        tensors = tensors_among(args, kwargs)
        return self._run(variant, tensors, model, guide, args, kwargs)

    def _build_compiled(self, short: Recording, params: list[Tensor], tensors: list[Tensor]) -> Program:
        plain = build_program(short, params, tensors)
        try:
            fused = fuse(short, params)
            program = build_program(fused.recording, params, tensors)
        except (NotCompiledError, NoGraphError) as error:
            self._note(str(error))
            return plain
        self._plain = plain
        self.keys.append(fused.key)
        logger.info("compiled a step in %.1f s", fused.compile_s)
        return program

    def _note(self, reason: str) -> None:
        if self.notice is None:
            self.notice = reason
            logger.info("steps are captured, but not compiled: %s", reason)


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

"""The loss and the gradients of an SVI's steps, computed from a recording where a step may be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.infer
from torch import Tensor

from distopt.infer.capture.compiled import CompiledCapture
from distopt.infer.capture.modes import CaptureMode, StepMode, is_checked_late, mode_of_step
from distopt.infer.capture.rows import TensorRows
from distopt.infer.capture.step import StepCapture
from distopt.infer.deterministic import Deterministic
from distopt.optim.distributed import DistributedOptimizer
from distopt.optim.distributed.stepping import Loss
from distopt.optim.distributed.svi_step import loss_and_named_params
from distopt.reduce.layout import Layout


class StepGradients:
    """Computes losses and gradients as an SVI's eager steps do, in every bit unless they are compiled.

    Args:
        capture: Which steps are captured.
        loss_and_grads: Of the SVI, as it is now.
        compile_from_step: The step from which `auto` compiles; None if it never does.

    Attributes:
        captured: The `StepCapture` that runs the steps, None for `capture="off"`.
    """

    def __init__(
        self, capture: CaptureMode, loss_and_grads: Callable[..., Any], compile_from_step: int | None = None
    ) -> None:
        self._capture: CaptureMode = capture
        self._compile_from_step = compile_from_step
        self._num_calls = 0
        self._layout: Layout | None = None  # in whose buckets captured steps leave gradients
        self.captured: StepCapture | None = None
        if capture != "off":
            self._use_capture("compiled" if capture == "compiled" else "graph", loss_and_grads)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled and copied: all but the recordings, which the copy makes anew."""
        loss_and_grads = None if self.captured is None else self.captured.loss_and_grads
        made_from = (self._capture, loss_and_grads, self._compile_from_step)
        return {"made_from": made_from, "num_calls": self._num_calls}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Takes the state of another one."""
        StepGradients.__init__(self, *state["made_from"])
        self._num_calls = state["num_calls"]

    def __call__(
        self,
        svi: pyro.infer.SVI,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        is_checked: bool | None = None,
        step: int | None = None,
    ) -> tuple[Loss, Sequence[Tensor]]:
        """Leaves gradients in the parameters that a step names, and returns the loss and these parameters.

        Args:
            svi: The SVI.
            args: The arguments of model and guide; `TensorRows` lets a captured step select them itself.
            kwargs: Their keyword arguments.
            is_checked: Whether Pyro checks this step, which `capture="auto"` leaves eager then; None for every 100th.
            step: Number of the step in the run, counted from 1; None for how often this was called.
        """
        self._num_calls += 1
        if is_checked is None:
            is_checked = is_checked_late(self._num_calls)
        number = self._num_calls if step is None else step
        mode = mode_of_step(
            self._capture, is_checked=is_checked, step=number, compile_from_step=self._compile_from_step
        )
        with Deterministic():
            if mode == "eager":
                return loss_and_named_params(svi, args, kwargs)

            captured = self._use_capture(mode, svi.loss_and_grads)
            self._leave_gradients_in_buckets(svi, captured)
            whole = (args,) if isinstance(args, TensorRows) else args
            result = captured(svi.model, svi.guide, *whole, **kwargs)
        return result.loss, result.params

    def _use_capture(self, mode: StepMode, loss_and_grads: Callable[..., Any]) -> StepCapture:
        """Returns what captures steps in this mode, and makes it if there is another one."""
        kind = CompiledCapture if mode == "compiled" else StepCapture
        captured = self.captured
        # Pyro's SVI may be given another loss between its steps.
        if captured is None or type(captured) is not kind or captured.loss_and_grads != loss_and_grads:
            captured = self.captured = kind(loss_and_grads)
            self._layout = None
        return captured

    def _leave_gradients_in_buckets(self, svi: pyro.infer.SVI, captured: StepCapture) -> None:
        """Lets captured steps write gradients to where they are reduced."""
        if not isinstance(svi.optim, DistributedOptimizer):
            return
        layout = svi.optim.reducer.layout
        if layout is not self._layout:
            self._layout = layout
            captured.use_gradient_buffers(layout.gradient_buffers())

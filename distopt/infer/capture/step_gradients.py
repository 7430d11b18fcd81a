"""The loss and the gradients of an SVI's steps, computed from a recording where a step may be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.infer
from torch import Tensor

from distopt.infer.capture.compiled import CompiledCapture
from distopt.infer.capture.modes import CaptureMode, is_checked_late, mode_of_step
from distopt.infer.capture.rows import TensorRows
from distopt.infer.capture.step import StepCapture
from distopt.optim.distributed import DistributedOptimizer
from distopt.optim.distributed.stepping import Loss
from distopt.optim.distributed.svi_step import loss_and_named_params
from distopt.reduce.layout import Layout


class StepGradients:
    """Computes losses and gradients as an SVI's eager steps do, in every bit unless they are compiled.

    Args:
        capture: Which steps are captured.
        loss_and_grads: Of the SVI, as it is now.

    Attributes:
        captured: The `StepCapture` that runs the steps, None for `capture="off"`.
    """

    def __init__(self, capture: CaptureMode, loss_and_grads: Callable[..., Any]) -> None:
        self._capture: CaptureMode = capture
        self._num_calls = 0
        self._layout: Layout | None = None  # in whose buckets captured steps leave gradients
        self.captured = self._make_capture(loss_and_grads)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled and copied: all but the recordings, which the copy makes anew."""
        loss_and_grads = None if self.captured is None else self.captured.loss_and_grads
        return {"capture": self._capture, "num_calls": self._num_calls, "loss_and_grads": loss_and_grads}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Takes the state of another one."""
        StepGradients.__init__(self, state["capture"], state["loss_and_grads"])
        self._num_calls = state["num_calls"]

    def __call__(
        self, svi: pyro.infer.SVI, args: Sequence[Any], kwargs: Mapping[str, Any], *, is_checked: bool | None = None
    ) -> tuple[Loss, Sequence[Tensor]]:
        """Leaves gradients in the parameters that a step names, and returns the loss and these parameters.

        Args:
            svi: The SVI.
            args: The arguments of model and guide; `TensorRows` lets a captured step select them itself.
            kwargs: Their keyword arguments.
            is_checked: Whether Pyro checks this step, which `capture="auto"` leaves eager then; None for every 100th.
        """
        self._num_calls += 1
        if is_checked is None:
            is_checked = is_checked_late(self._num_calls)
        # Pyro's SVI may be given another loss between its steps.
        if self.captured is not None and self.captured.loss_and_grads != svi.loss_and_grads:
            self.captured = self._make_capture(svi.loss_and_grads)
            self._layout = None
        if self.captured is None or mode_of_step(self._capture, is_checked=is_checked) == "eager":
            return loss_and_named_params(svi, args, kwargs)

        self._leave_gradients_in_buckets(svi, self.captured)
        whole = (args,) if isinstance(args, TensorRows) else args
        result = self.captured(svi.model, svi.guide, *whole, **kwargs)
        return result.loss, result.params

    def _make_capture(self, loss_and_grads: Callable[..., Any]) -> StepCapture | None:
        if self._capture == "off":
            return None
        make = CompiledCapture if self._capture == "compiled" else StepCapture
        return make(loss_and_grads)

    def _leave_gradients_in_buckets(self, svi: pyro.infer.SVI, captured: StepCapture) -> None:
        """Lets captured steps write gradients to where they are reduced."""
        if not isinstance(svi.optim, DistributedOptimizer):
            return
        layout = svi.optim.reducer.layout
        if layout is not self._layout:
            self._layout = layout
            captured.use_gradient_buffers(layout.gradient_buffers())

"""Stochastic variational inference on all ranks at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import pyro
import pyro.infer
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceTailAdaptive_ELBO
from pyro.infer.util import zero_grads
from torch import Tensor

from distopt.infer.capture import StepCapture, TensorRows
from distopt.infer.sharded_plate import share_plates
from distopt.optim.distributed import DistributedOptimizer, StepInfo
from distopt.reduce.layout import Layout
from distopt.rng import generators_state, set_generators_state

CaptureMode: TypeAlias = Literal["graph", "off"]


class SVI(pyro.infer.SVI):  # type: ignore[misc]
    r"""Pyro's SVI on all ranks: losses and gradients are means over the ranks, and errors reach all of them.

    With rank `r` reading its share of the data, all ranks together step on the gradient of

    .. math:: \frac{1}{W} \sum_{r=1}^{W} w_r \, \mathrm{loss}_r

    where each `loss_r` is scaled to the full data by the model's plates, as it is for one worker. The loss is sent
    along with the gradients and costs no further collective. With an optimizer that is not distributed, this is Pyro's
    SVI.

    Plates that are sharded in the model (`sharded_plate`, `shard`) are sharded in the guide too, even in an autoguide.

    Args:
        model: The model, called with the arguments of `step`.
        guide: The guide, called with the same arguments.
        optim: A `DistributedOptimizer`, or any optimizer that Pyro's SVI takes.
        loss: An ELBO.
        weight: `w_r`, such as `GlobalBatches.weight` if ranks read unequally many rows; the mean over the ranks must be
            1. Sites in sharded plates are not weighted.
        capture: "graph" records a step and runs later ones from the recording, with the losses, gradients and random
            numbers of eager steps in every bit (see `distopt.infer.capture`); a step that cannot be captured stays
            eager, and `captured.refusal` says why. "off": every step is eager.

    Attributes:
        captured: The `StepCapture` that runs the steps, None for `capture="off"`.

    Raises:
        ValueError: `capture` is neither "graph" nor "off".

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from distopt.optim import Adam
        >>> pyro.clear_param_store()
        >>> def model(data):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(data)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=data)
        >>> guide = pyro.infer.autoguide.AutoDelta(model)
        >>> svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO())
        >>> losses = [svi.step(torch.ones(5)) for _ in range(100)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: pyro.infer.ELBO,
        *,
        weight: float = 1.0,
        capture: CaptureMode = "off",
    ) -> None:
        if capture not in get_args(CaptureMode):
            raise ValueError(f"capture={capture!r}: must be one of {', '.join(map(repr, get_args(CaptureMode)))}.")
        super().__init__(*share_plates(model, guide, weight), optim, loss)
        self.captured = StepCapture(self.loss_and_grads) if capture == "graph" else None
        self._layout: Layout | None = None  # in whose buckets captured steps leave gradients

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Runs guide and model once, so that their parameters exist before the first step; changes no parameter.

        Args:
            *args: The arguments of model and guide.
            **kwargs: Their keyword arguments.
        """
        loss = self.loss
        # This objective has only a gradient, its `loss` raises.
        if isinstance(getattr(loss, "__self__", None), TraceTailAdaptive_ELBO):
            loss = partial(Trace_ELBO.loss, loss.__self__)
        loss(self.model, self.guide, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one gradient step.

        Args:
            *args: The arguments of model and guide.
            **kwargs: Their keyword arguments.

        Returns:
            The loss in nats, mean over the ranks.

        Raises:
            Exception: What model or guide raised on this rank; no rank has stepped.
            PeerError: Model or guide raised on another rank; no rank has stepped.

        Cost:
            The collectives of the optimizer. With several ranks, the first step runs guide and model once more, so that
            all ranks compute its gradient from the same values.
        """
        if not isinstance(self.optim, DistributedOptimizer):
            return self._step_alone(args, kwargs)
        loss = self.step_with(args, kwargs).loss
        assert loss is not None
        return loss

    def step_with(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        stop: bool = False,
        measure_norm: bool = False,
    ) -> StepInfo:
        """Does what `step` does, and exchanges what a training loop needs to know.

        Args:
            args: The arguments of model and guide; `TensorRows` lets a captured step select them itself.
            kwargs: Their keyword arguments.
            step: Number of the step in the caller's loop; a rank that has left out a step is reported then.
            stop: Whether this rank asks all ranks to stop.
            measure_norm: Whether to compute the norm of the gradient.

        Returns:
            What the ranks have learned from each other; its loss is this rank's own, in nats, when the call only added
            gradients to those of the next one (`backward_passes_per_step`).

        Raises:
            TypeError: The optimizer is not distributed.
            Exception: As `step` does.
            PeerError: As `step` does.

        Cost:
            As `step`.
        """
        if not isinstance(self.optim, DistributedOptimizer):
            raise TypeError(f"step_with() needs a DistributedOptimizer, found {type(self.optim).__name__}; use step().")
        kwargs = kwargs or {}

        # A model that raises on one rank would leave the others waiting in the all-reduce: they are told first.
        try:
            if not self.optim.is_synchronized:
                self._meet(*args, **kwargs)
            loss, params = self._loss_and_params(args, kwargs)
        except Exception as error:
            self.optim.abort(error)
            raise

        info = self.optim.step_with(params, loss=loss, step=step, stop=stop, measure_norm=measure_norm)
        self.optim.zero_grad(params)
        return info if info.loss is not None else replace(info, loss=loss)

    def _loss_and_params(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[float, Sequence[Tensor]]:
        """Computes the loss and its gradients; returns the loss, and the parameters that the step named."""
        if self.captured is not None:
            self._leave_gradients_in_buckets(self.captured)
            whole = (args,) if isinstance(args, TensorRows) else args
            result = self.captured(self.model, self.guide, *whole, **kwargs)
            return float(result.loss), result.params
        with poutine.trace(param_only=True) as capture:
            loss = float(self.loss_and_grads(self.model, self.guide, *args, **kwargs))
        # In the order of the model and not of a set, which would differ from one run of a process to the next.
        return loss, list(dict.fromkeys(site["value"].unconstrained() for site in capture.trace.nodes.values()))

    def _leave_gradients_in_buckets(self, captured: StepCapture) -> None:
        """Lets captured steps write gradients to where they are reduced."""
        if not isinstance(self.optim, DistributedOptimizer):
            return
        layout = self.optim.reducer.layout
        if layout is not self._layout:
            self._layout = layout
            captured.use_gradient_buffers(layout.gradient_buffers())

    def _step_alone(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """Takes a step with an optimizer that is not distributed, as Pyro's SVI does."""
        if self.captured is None:
            return float(super().step(*args, **kwargs))
        loss, params = self._loss_and_params(args, kwargs)
        self.optim(params)
        zero_grads(params)
        return loss

    def _meet(self, *args: Any, **kwargs: Any) -> None:
        """Agrees on the first values of the parameters before a gradient is computed from them."""
        device = self.optim.backend.device
        state = generators_state(device)  # kept, so that the first step draws what it would draw on a single rank
        with poutine.trace(param_only=True) as capture:
            self.init(*args, **kwargs)
        set_generators_state(state, device)
        self.optim.synchronize({site["value"].unconstrained() for site in capture.trace.nodes.values()})

"""Stochastic variational inference on all ranks at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro.infer
from pyro.infer.util import zero_grads

from distopt.infer.capture import StepCapture
from distopt.infer.capture.modes import CaptureMode, check_mode
from distopt.infer.capture.step_gradients import StepGradients
from distopt.infer.deterministic import Deterministic
from distopt.infer.sharded_plate import share_plates
from distopt.optim.distributed import DistributedOptimizer, StepInfo
from distopt.optim.distributed.pyro_hooks import offer_svi
from distopt.optim.distributed.stepping import Loss
from distopt.optim.distributed.svi_step import run_once, step_on_all_ranks


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
        loss: An ELBO; or a function of model, guide and their arguments, as Pyro's SVI takes it.
        loss_and_grads: Computes such a loss and its gradients; None for calling `backward` on what `loss` returns.
        num_samples: As in Pyro's SVI, deprecated there.
        num_steps: Likewise.
        weight: `w_r`, such as `GlobalBatches.weight` if ranks read unequally many rows; the mean over the ranks must be
            1. Sites in sharded plates are not weighted.
        capture: "auto" records a step and runs later ones from the recording, with the losses, gradients and random
            numbers of eager steps in every bit (see `distopt.infer.capture`); every 100th step is eager, for Pyro's
            validation. A step that cannot be captured stays eager, and `captured.refusal` says why. "graph": likewise
            without those for Pyro's validation. "compiled": likewise, from the first step on, and by torch's compiler:
            quicker for many rows, and equal but for rounding; where it cannot be, as "graph", and `captured.notice`
            says why. "off": every step is eager.
        compile_from_step: The step, counted from 1, from which "auto" takes steps as "compiled" does; None for never.
            `step_with` takes the step as its `step`, which counts from 0; without one, calls are counted. A script
            that resumes gives it, and compiles the steps that it would have compiled had it never stopped.
        **kwargs: What Pyro's `TracePosterior` takes.

    Raises:
        ValueError: `capture` is none of these, or another one than "auto" has a `compile_from_step`.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
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
        loss: pyro.infer.ELBO | Callable[..., Any],
        loss_and_grads: Callable[..., Any] | None = None,
        num_samples: int = 0,
        num_steps: int = 0,
        *,
        weight: float = 1.0,
        capture: CaptureMode = "auto",
        compile_from_step: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_mode(capture, compile_from_step)
        wrapped = share_plates(model, guide, weight)
        super().__init__(*wrapped, optim, loss, loss_and_grads, num_samples, num_steps, **kwargs)
        self._gradients = StepGradients(capture, self.loss_and_grads, compile_from_step)

    @property
    def captured(self) -> StepCapture | None:
        """The `StepCapture` that runs the steps, None for `capture="off"`."""
        return self._gradients.captured

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Takes the state of another SVI, which may have been pickled before steps were captured."""
        self.__dict__.update(state)
        if "_gradients" not in state:
            self._gradients = StepGradients("auto", self.loss_and_grads)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what is pickled and copied: all but the recordings of steps, which the copy makes anew."""
        return {**vars(self), "_gradients": copy.copy(self._gradients)}

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Runs guide and model once, so that their parameters exist before the first step; changes no parameter.

        Args:
            *args: The arguments of model and guide.
            **kwargs: Their keyword arguments.
        """
        run_once(self, args, kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Loss:
        """Takes one gradient step.

        Args:
            *args: The arguments of model and guide.
            **kwargs: Their keyword arguments.

        Returns:
            The loss in nats, mean over the ranks; a tuple where the objective has several, as `ReweightedWakeSleep`.

        Raises:
            Exception: What model or guide raised on this rank; no rank has stepped.
            PeerError: Model or guide raised on another rank; no rank has stepped.

        Cost:
            The collectives of the optimizer. With several ranks, the first step runs guide and model once more, so that
            all ranks compute its gradient from the same values.
        """
        offer_svi(self, args, kwargs)
        if not isinstance(self.optim, DistributedOptimizer):
            return self._step_alone(args, kwargs)
        info = self.step_with(args, kwargs)
        return info.losses if len(info.losses) > 1 else info.losses[0]

    def step_with(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        step: int | None = None,
        stop: bool = False,
        measure_norm: bool = False,
        is_checked: bool | None = None,
    ) -> StepInfo:
        """Does what `step` does, and exchanges what a training loop needs to know.

        Args:
            args: The arguments of model and guide; `TensorRows` lets a captured step select them itself.
            kwargs: Their keyword arguments.
            step: Number of the step in the caller's loop; a rank that has left out a step is reported then.
            stop: Whether this rank asks all ranks to stop.
            measure_norm: Whether to compute the norm of the gradient.
            is_checked: Whether Pyro checks this step, which `capture="auto"` leaves eager then; None for every 100th.

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
        shared = {"step": step, "stop": stop, "measure_norm": measure_norm}
        number = None if step is None else step + 1
        compute = partial(self._gradients, self, is_checked=is_checked, step=number)
        return step_on_all_ranks(self, args, kwargs or {}, compute, self.optim.zero_grad, **shared)

    def _step_alone(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Loss:
        """Takes a step with an optimizer that is not distributed, as Pyro's SVI does."""
        if self.captured is None:
            with Deterministic():
                loss: Loss = super().step(*args, **kwargs)
            return loss
        loss, params = self._gradients(self, args, kwargs)
        self.optim(params)
        zero_grads(params)
        return loss

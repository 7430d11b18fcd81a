"""Stochastic variational inference on all ranks at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.infer
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceTailAdaptive_ELBO

from distopt.infer.sharded_plate import share_plates
from distopt.optim.distributed import DistributedOptimizer
from distopt.rng import generators_state, set_generators_state


class SVI(pyro.infer.SVI):  # type: ignore[misc]
    r"""Pyro's SVI, whose loss is the mean over ranks and whose errors reach all of them.

    With rank `r` reading its part of the data, all ranks together step on the gradient of

    .. math:: \frac{1}{W} \sum_{r=1}^{W} w_r \, \mathrm{loss}_r

    where each `loss_r` is scaled to the full data by the model's plates, as it is for one worker. The loss travels in
    the optimizer's control slots, so it costs no collective of its own. With an optimizer that is not distributed, this
    is Pyro's SVI.

    Plates that are sharded in the model (`sharded_plate`, `shard`) are so in the guide, be it Pyro's own autoguide.

    Args:
        model: the model, called with the arguments of `step`.
        guide: the guide, called likewise.
        optim: a `DistributedOptimizer`, or any optimizer that Pyro's SVI takes.
        loss: an ELBO.
        weight: `w_r`; `GlobalBatches.weight` where ranks read unequally many rows. Their mean must be 1. Sites in
            sharded plates are not weighted.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: pyro.infer.ELBO,
        *,
        weight: float = 1.0,
    ) -> None:
        super().__init__(*share_plates(model, guide, weight), optim, loss)

    def init(self, *args: Any, **kwargs: Any) -> None:
        """Runs guide and model once, so that their parameters exist before the first step, and changes none.

        A restored checkpoint or the first step of a distributed optimizer then finds them all.
        """
        loss = self.loss
        if isinstance(
            getattr(loss, "__self__", None), TraceTailAdaptive_ELBO
        ):  # its own raises: it has a gradient only
            loss = partial(Trace_ELBO.loss, loss.__self__)
        loss(self.model, self.guide, *args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Takes one gradient step on the loss and returns its mean over ranks, in nats.

        Raises:
            Exception: whatever model or guide raised, on this rank or, named as such, on another one; no rank has
                stepped.

        Cost: the optimizer's collectives; the first step, with several ranks, runs guide and model once more, so that
        all ranks compute its gradient from the same values.
        """
        if not isinstance(self.optim, DistributedOptimizer):
            return float(super().step(*args, **kwargs))
        try:
            if self.optim.is_new:
                self._meet(*args, **kwargs)
            with poutine.trace(param_only=True) as capture:
                loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        except Exception as error:
            self.optim.abort(error)
            raise
        params = {site["value"].unconstrained() for site in capture.trace.nodes.values()}
        self.optim.local_loss = float(loss)
        self.optim(params)
        self.optim.zero_grad(params)
        return float(loss if self.optim.mean_loss is None else self.optim.mean_loss)

    def _meet(self, *args: Any, **kwargs: Any) -> None:
        """Agrees on the first values of the parameters before a gradient is computed from them."""
        device = self.optim.backend.device
        noise = generators_state(device)
        with poutine.trace(param_only=True) as capture:
            self.init(*args, **kwargs)
        set_generators_state(noise, device)
        self.optim.synchronize({site["value"].unconstrained() for site in capture.trace.nodes.values()})

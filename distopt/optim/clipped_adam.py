"""Adam with clipped gradients and a learning rate that decays at each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyro.optim.clipped_adam
import torch
from torch.optim.optimizer import Optimizer, ParamsT

from distopt.optim.kernels import (
    Hyper,
    PendingStep,
    adam_defaults,
    evaluated,
    rounds_each_operation,
    started,
    step_all_,
)

_SHARED = ("eps", "clip_norm", "weight_decay", "centered_variance")


class ClippedAdam(pyro.optim.clipped_adam.ClippedAdam):  # type: ignore[misc]
    r"""Adam whose gradient is clipped elementwise and whose learning rate is multiplied by `lrd` at each step.

    .. math::
        g &\leftarrow \mathrm{clamp}(g, -c, c) + \lambda \theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2
            \quad\text{or with centered variance}\quad \beta_2 v + (1 - \beta_2) (g - m)^2 \\
        \theta &\leftarrow \theta - \gamma_k \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \frac{m}{\sqrt v + \epsilon},
            \qquad \gamma_k = \gamma_0\, d^k

    Args:
        params: Dense tensors, or torch parameter groups of them.
        lr: Learning rate :math:`\gamma_0`.
        betas: Decay rates of the two moments.
        eps: Added to the square root of the second moment.
        weight_decay: L2 penalty :math:`\lambda`.
        clip_norm: Bound :math:`c` on the magnitude of each element of the gradient.
        lrd: Factor :math:`d` of the learning rate at each step.
        centered_variance: Whether :math:`v` follows the variance of the gradient and not its square.

    State of each parameter: `step`, a number; `exp_avg` and `exp_avg_sq`, shape and dtype of the parameter.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> optimizer = ClippedAdam([x], lr=0.1, clip_norm=1.0)
        >>> (1e6 * x).sum().backward()
        >>> optimizer.step()
        >>> x.detach()
        tensor([0.9000, 0.9000])

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980, end of section 2;
        V. Rengaraj et al., doi 10.3390/computation11050095, equation 2 (centered variance).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
        centered_variance: bool = False,
    ) -> None:
        defaults = adam_defaults(
            "ClippedAdam", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm, lrd=lrd
        )
        Optimizer.__init__(self, params, defaults | {"centered_variance": centered_variance})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient, which may be overwritten by the clipped one.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = evaluated(closure)
        if rounds_each_operation(self.param_groups):
            super().step()
            return loss

        # Parameter groups that differ in their rate alone, as they do where `lrd` decays it, are one list of steps.
        by_hyper: dict[tuple[Any, ...], list[PendingStep]] = defaultdict(list)
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            same = by_hyper[(tuple(group["betas"]), *(group[key] for key in _SHARED))]
            same += [
                PendingStep(p, p.grad, started(self.state[p], p), group["lr"])
                for p in group["params"]
                if p.grad is not None
            ]

        for hyper, pending in by_hyper.items():
            if pending:
                step_all_(pending, Hyper(*hyper))
        return loss

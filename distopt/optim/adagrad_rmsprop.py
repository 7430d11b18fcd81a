"""The step-size sequence of automatic differentiation variational inference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pyro.optim.adagrad_rmsprop
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from distopt.optim.kernels import check_at_least_zero, evaluated, is_fusable, rounds_each_operation, scaled_descent_


class AdagradRMSProp(pyro.optim.adagrad_rmsprop.AdagradRMSProp):  # type: ignore[misc]
    r"""A mash-up of Adagrad and RMSProp, the step size of automatic differentiation variational inference.

    With gradient :math:`g_k` of step :math:`k = 1, 2, \dots`

    .. math::
        s_k &= t\, g_k^2 + (1 - t)\, s_{k-1}, \qquad s_1 = g_1^2 \\
        \theta_k &= \theta_{k-1} - \eta\, k^{-1/2 + \delta} \, \frac{g_k}{1 + \sqrt{s_k}}

    Args:
        params: Dense tensors, or torch parameter groups of them.
        eta: Scale of the step size.
        delta: Exponent that keeps the step sizes summable; tiny.
        t: Weight of the newest squared gradient, in (0, 1].

    State of each parameter: `step`, a number, and `sum`, shape and dtype of the parameter.

    Example:
        >>> x = torch.ones(3, requires_grad=True)
        >>> optimizer = AdagradRMSProp([x], eta=0.5)
        >>> x.square().sum().backward()
        >>> optimizer.step()
        >>> x.detach()
        tensor([0.6667, 0.6667, 0.6667])

    References:
        A. Kucukelbir, D. Tran, R. Ranganath, A. Gelman, D. M. Blei, Automatic Differentiation Variational Inference,
        arXiv 1603.00788, equations 10 and 11.
    """

    def __init__(self, params: ParamsT, eta: float = 1.0, delta: float = 1e-16, t: float = 0.1) -> None:
        check_at_least_zero("AdagradRMSProp", eta=eta)
        if not 0.0 < t <= 1.0:
            raise ValueError(f"AdagradRMSProp: t is {t}, expected a number in (0, 1].")
        Optimizer.__init__(self, params, {"eta": eta, "delta": delta, "t": t})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "sum": torch.zeros_like(p.detach())}

    def share_memory(self) -> None:
        """Moves the state into memory that other processes can share."""
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"].share_memory_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = evaluated(closure)
        if rounds_each_operation(self.param_groups):
            super().step()
            return loss
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        if any(p.grad is not None and p.grad.is_sparse for p in params):
            raise RuntimeError(
                "AdagradRMSProp: a gradient is sparse, expected dense ones; make it dense, or use SparseAdam."
            )

        # Both decay and step size depend on the number of steps, which parameters that were skipped now and then do not
        # share: those that do are one call.
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        by_step: dict[int, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            state = self.state[p]
            state["step"] += 1
            by_step[int(state["step"])].append(i)

        step_each = scaled_descent_ if is_fusable(params + grads) else _scaled_descent_
        for step, chosen in by_step.items():
            step_each(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [self.state[params[i]]["sum"] for i in chosen],
                lr=group["eta"] * step ** (-0.5 + group["delta"]),
                decay=0.0 if step == 1 else 1.0 - group["t"],
                eps=1.0,
            )


def _scaled_descent_(
    params: list[Tensor], grads: list[Tensor], squares: list[Tensor], *, lr: float, decay: float, eps: float
) -> None:
    """Does what `scaled_descent_` does, for tensors that its kernel does not take."""
    torch._foreach_mul_(squares, decay)
    torch._foreach_addcmul_(squares, grads, grads, 1.0 - decay)
    scales = torch._foreach_sqrt(squares)
    torch._foreach_add_(scales, eps)
    torch._foreach_addcdiv_(params, grads, scales, -lr)

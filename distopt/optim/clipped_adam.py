"""Adam with clipped gradients and a learning rate that decays at each step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from distopt.optim.fused_adam import adam_, is_fusable

_CACHED_NUMEL = 65_536  # four float32 arrays of this length fit a second-level cache


class ClippedAdam(Optimizer):
    r"""Adam whose gradient is clipped elementwise and whose learning rate is multiplied by `lrd` at each step.

    .. math::
        g &\leftarrow \mathrm{clamp}(g, -c, c) + \lambda \theta \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2
            \quad\text{or with centered variance}\quad \beta_2 v + (1 - \beta_2) (g - m)^2 \\
        \theta &\leftarrow \theta - \gamma_k \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \frac{m}{\sqrt v + \epsilon},
            \qquad \gamma_k = \gamma_0\, d^k

    Args:
        params: dense tensors, or torch parameter groups of them.
        lr: learning rate :math:`\gamma_0`.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        weight_decay: L2 penalty :math:`\lambda`.
        clip_norm: bound :math:`c` on the magnitude of each element of the gradient.
        lrd: factor :math:`d` of the learning rate at each step.
        centered_variance: whether :math:`v` follows the variance of the gradient and not its square.

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
        if not lr >= 0.0:
            raise ValueError(f"ClippedAdam: lr is {lr}, expected a number >= 0.")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"ClippedAdam: betas are {betas}, expected two numbers in [0, 1).")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "lrd": lrd,
            "centered_variance": centered_variance,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient, which is clipped in place.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        states = [self._state(p) for p in params]
        for state in states:
            state["step"] += 1
        if not group["centered_variance"] and is_fusable(params + grads):
            self._step_fused(group, params, grads, states)
        else:
            self._step_foreach(group, params, grads, states)

    def _step_fused(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Any]) -> None:
        """One pass over memory for all parameters of one step count; `eps` is added where the kernel divides by it."""
        beta1, beta2 = group["betas"]
        by_step: dict[int, list[int]] = defaultdict(list)
        for i, state in enumerate(states):
            by_step[int(state["step"])].append(i)
        for step, chosen in by_step.items():
            lists = [
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [states[i]["exp_avg"] for i in chosen],
                [states[i]["exp_avg_sq"] for i in chosen],
            ]
            for part in _cache_sized(lists):
                if len(part[1]) == 1:
                    part[1][0].clamp_(-group["clip_norm"], group["clip_norm"])
                else:
                    torch._foreach_clamp_min_(part[1], -group["clip_norm"])
                    torch._foreach_clamp_max_(part[1], group["clip_norm"])
                adam_(
                    *part,
                    step=step,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"] / math.sqrt(1 - beta2**step),
                    weight_decay=group["weight_decay"],
                )

    def _step_foreach(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Any]
    ) -> None:
        torch._foreach_clamp_min_(grads, -group["clip_norm"])
        torch._foreach_clamp_max_(grads, group["clip_norm"])
        if group["weight_decay"] != 0:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        beta1, beta2 = group["betas"]
        means = [s["exp_avg"] for s in states]
        squares = [s["exp_avg_sq"] for s in states]
        torch._foreach_mul_(means, beta1)
        torch._foreach_add_(means, grads, alpha=1 - beta1)
        deviations = list(torch._foreach_sub(grads, means)) if group["centered_variance"] else grads
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, deviations, deviations, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, group["eps"])
        sizes = [-group["lr"] * math.sqrt(1 - beta2 ** s["step"]) / (1 - beta1 ** s["step"]) for s in states]
        torch._foreach_addcdiv_(params, means, scales, sizes)

    def _state(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


def _cache_sized(lists: list[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Parts lists of contiguous tensors, and big tensors among them, so that two passes share a cache."""
    small: list[int] = []
    for i, first in enumerate(lists[0]):
        if first.numel() <= _CACHED_NUMEL:
            small.append(i)
            continue
        for pieces in zip(*(torch.split(tensors[i].view(-1), _CACHED_NUMEL) for tensors in lists), strict=True):
            yield [[piece] for piece in pieces]
    if small:
        yield [[tensors[i] for i in small] for tensors in lists]

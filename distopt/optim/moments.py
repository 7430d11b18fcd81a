"""Steps of Adam with clipped gradients over lists of tensors, each at its own step number and learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distopt.optim.fused_adam import adam_, is_fusable

_SMALL_NUMEL = 16_384  # up to here a call for each costs more than a pass over its memory


@dataclass(frozen=True)
class Hyper:
    """What tensors must have in common to be stepped together."""

    betas: tuple[float, float]
    eps: float
    clip_norm: float
    weight_decay: float = 0.0
    centered_variance: bool = False


@dataclass(slots=True)
class Pending:
    """One tensor and what steps it; `state` holds `step`, the number of this step, `exp_avg` and `exp_avg_sq`."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    lr: float


def started(state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Returns `state` at its next step; an empty one gets moments of the shape of `like`."""
    if not state:
        state.update(step=0, exp_avg=torch.zeros_like(like), exp_avg_sq=torch.zeros_like(like))
    state["step"] += 1
    return state


def step_all_(pending: Sequence[Pending], hyper: Hyper) -> None:
    """Takes the steps that are `pending`, in as few calls as may be; gradients may be overwritten."""
    grads = [x.grad for x in pending]
    if hyper.centered_variance or not is_fusable([*grads, *[x.param for x in pending]]):
        _step_foreach(pending, hyper)
        return
    _clip_(grads, hyper.clip_norm)
    alike: dict[tuple[int, float], list[Pending]] = defaultdict(list)
    for x in pending:
        alike[int(x.state["step"]), x.lr].append(x)
    for (step, lr), same in alike.items():
        _step_fused(same, hyper, step, lr)


def _step_fused(pending: Sequence[Pending], hyper: Hyper, step: int, lr: float) -> None:
    """One pass over memory for all tensors of one step count; `eps` is added where the kernel divides by it."""
    constants: dict[str, Any] = {
        "step": step,
        "lr": lr,
        "beta1": hyper.betas[0],
        "beta2": hyper.betas[1],
        "eps": hyper.eps / math.sqrt(1 - hyper.betas[1] ** step),
        "weight_decay": hyper.weight_decay,
    }
    means, squares = [x.state["exp_avg"] for x in pending], [x.state["exp_avg_sq"] for x in pending]
    adam_([x.param for x in pending], [x.grad for x in pending], means, squares, **constants)


def _clip_(grads: Sequence[Tensor], bound: float) -> None:
    """Clips each number, of big tensors in one pass over memory where a list takes two."""
    small = []
    for g in grads:
        if g.numel() > _SMALL_NUMEL:
            g.clamp_(-bound, bound)
        else:
            small.append(g)
    if small:
        torch._foreach_clamp_min_(small, -bound)
        torch._foreach_clamp_max_(small, bound)


def _step_foreach(pending: Sequence[Pending], hyper: Hyper) -> None:
    """The same by lists of tensors of any dtype, and with the variance of the gradient in place of its square."""
    beta1, beta2 = hyper.betas
    params, grads = [x.param for x in pending], [x.grad for x in pending]
    means, squares = [x.state["exp_avg"] for x in pending], [x.state["exp_avg_sq"] for x in pending]
    _clip_(grads, hyper.clip_norm)
    if hyper.weight_decay != 0:
        grads = list(torch._foreach_add(grads, params, alpha=hyper.weight_decay))
    torch._foreach_mul_(means, beta1)
    torch._foreach_add_(means, grads, alpha=1 - beta1)
    deviations = list(torch._foreach_sub(grads, means)) if hyper.centered_variance else grads
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, deviations, deviations, 1 - beta2)
    scales = torch._foreach_sqrt(squares)
    torch._foreach_add_(scales, hyper.eps)
    sizes = [-x.lr * math.sqrt(1 - beta2 ** x.state["step"]) / (1 - beta1 ** x.state["step"]) for x in pending]
    torch._foreach_addcdiv_(params, means, scales, sizes)

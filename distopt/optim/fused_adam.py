"""Torch's one-pass Adam kernel, which with the right constants is also ClippedAdam, RMSprop and AdagradRMSProp.

The kernel computes, in one pass over memory,

    g <- g + weight_decay * p;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^k) * m / (sqrt(v) / sqrt(1 - beta2^k) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_kernel: Any = getattr(torch, "_fused_adam_", None)
_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def is_fusable(tensors: Sequence[Tensor]) -> bool:
    """Returns whether the kernel takes `tensors`: dense, of one dtype and device that it knows."""
    kinds = {(t.dtype, t.device, t.layout) for t in tensors}
    dtype, device, layout = next(iter(kinds))
    return (
        _kernel is not None
        and len(kinds) == 1
        and dtype in _DTYPES
        and device.type in ("cpu", "cuda")
        and layout is torch.strided
        and all(map(Tensor.is_contiguous, tensors))
    )


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Runs the kernel in place; all tensors are at step number `step`, which may be infinite (no bias correction)."""
    number = torch.full((), step, dtype=torch.float32, device=params[0].device)
    _kernel(
        params,
        grads,
        means,
        squares,
        [],
        [number] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=maximize,
    )


def scaled_descent_(
    params: list[Tensor],
    grads: list[Tensor],
    squares: list[Tensor],
    *,
    lr: float,
    decay: float,
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Steps `params` by `lr * g / (sqrt(v) + eps)` with `v` the running mean of `g^2`; `grads` may be overwritten.

    With `beta1 = 0` the mean is the gradient, whose memory serves for it; at step infinity nothing is corrected.
    """
    adam_(
        params,
        grads,
        grads,
        squares,
        step=math.inf,
        lr=lr,
        beta1=0.0,
        beta2=decay,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )

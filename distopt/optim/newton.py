"""One step of Newton's method on a batch of small independent problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Reduce: TypeAlias = Callable[[Tensor], Tensor]
"""Combines a tensor with those of other workers and returns the result, of the same shape."""

_TINY = 1e-8  # least curvature that is divided by


def identity(tensor: Tensor) -> Tensor:
    """Returns `tensor`: there are no other workers."""
    return tensor


def newton_update(loss: Tensor, x: Tensor, trust_radius: float | None = None, reduce: Reduce = identity) -> Tensor:
    r"""Returns `x` after one step of Newton's method, differentiable.

    With gradient :math:`g` and Hessian :math:`H` of each variable,

    .. math::
        x' = x - (H + \lambda I)^{-1} g, \qquad
        \lambda = \max\left(\frac{\lVert g \rVert}{r} - \lambda_{\min}(H),\; 10^{-8}\right)

    The smallest eigenvalue of the system is then at least :math:`\lVert g \rVert / r`, which keeps the step within the
    radius :math:`r`. Without a radius :math:`\lambda = 0`. One-dimensional variables take :math:`g / \max(H, 10^{-8})`,
    clamped to :math:`\pm r`; a step that is NaN there is left out.

    Args:
        loss: scalar, twice differentiable, a sum over the batch.
        x: shape (..., D).
        trust_radius: :math:`r`, in units of `x`.
        reduce: applied to gradient, shape (..., D), and Hessian, shape (..., D, D), before the system is solved.

    Returns:
        Shape (..., D); derivatives with respect to what `loss` depends on are kept, those through the old `x` are not.

    Raises:
        ValueError: when `loss` is no scalar or `x` has no dimension.

    References:
        Y. Yuan, A review of trust region algorithms for optimization, ICIAM 1999;
        B. Christianson, Reverse accumulation and attractive fixed points, Optimization Methods and Software 3.4, 1994.
    """
    if loss.shape != ():
        raise ValueError(f"Newton: the loss has shape {tuple(loss.shape)}, expected a scalar.")
    if x.dim() < 1:
        raise ValueError("Newton: a variable has shape (), expected (..., D); reshape it to (1,).")
    local = torch.autograd.grad(loss, [x], create_graph=True)[0]  # (..., D)
    size = x.shape[-1]
    rows = [torch.autograd.grad(local[..., i].sum(), [x], create_graph=True)[0] for i in range(size)]
    g, hessian = reduce(local), reduce(torch.stack(rows, dim=-1))  # (..., D), (..., D, D)
    if size == 1:
        step = g / hessian[..., 0].clamp(min=_TINY)
        step = torch.where(step.isnan(), torch.zeros_like(step), step)
        return x.detach() - (step if trust_radius is None else step.clamp(-trust_radius, trust_radius))
    if trust_radius is not None:
        smallest = torch.linalg.eigvalsh(hessian)[..., 0]  # (...)
        shift = (torch.linalg.vector_norm(g, dim=-1) / trust_radius - smallest).clamp(min=_TINY)
        hessian = hessian + shift[..., None, None] * torch.eye(size, dtype=x.dtype, device=x.device)
    solved: Tensor = torch.linalg.solve(hessian, g)
    return x.detach() - solved

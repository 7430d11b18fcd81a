"""Adam on time series: in the time domain and, at once, in the frequency domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.ops.tensor_utils import dct, idct, next_fast_len
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class DCTAdam(Optimizer):
    r"""ClippedAdam that steps parameters of time series in the frequency domain as well.

    A parameter that has an attribute `_pyro_dct_dim` (a negative dim, its time) is stepped by

    .. math::
        h = (g, C g), \qquad
        \theta \leftarrow \theta - \gamma_k\, (u_{\mathrm{time}} + C^{-1} u_{\mathrm{frequency}}),

    where :math:`C` is the orthonormal discrete cosine transform along time (padded with zeros to a length that
    transforms fast) and :math:`u` the direction of Adam for the gradient :math:`h`. So errors that are slow in time are
    put right as quickly as those of single points.

    Args:
        params: dense tensors, or torch parameter groups of them.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        clip_norm: bound on the magnitude of each element of the gradient.
        lrd: factor of the learning rate at each step.
        subsample_aware: whether only those elements of a parameter are updated that its attribute `_pyro_subsample`
            (`{dim: indices}`, set by `pyro.plate`) names; each element then counts its own steps.

    State of each parameter: `step`, `exp_avg` and `exp_avg_sq`; the latter two of the shape of :math:`h`, in which time
    is about twice as long.

    Example:
        >>> x = torch.zeros(8, requires_grad=True)
        >>> x._pyro_dct_dim = -1
        >>> optimizer = DCTAdam([x], lr=0.1)
        >>> (x - 1.0).square().sum().backward()
        >>> optimizer.step()
        >>> bool((x > 0.09).all())
        True

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, arXiv 1412.6980.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float = 10.0,
        lrd: float = 1.0,
        subsample_aware: bool = False,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"DCTAdam: lr is {lr}, expected a number >= 0.")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "clip_norm": clip_norm,
            "lrd": lrd,
            "subsample_aware": subsample_aware,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                subsample = getattr(p, "_pyro_subsample", {})
                if subsample and group["subsample_aware"]:
                    self._step_rows(group, p, subsample)
                else:
                    self._step_all(group, p)
        return loss

    def _step_all(self, group: dict[str, Any], p: Tensor) -> None:
        gradient = p.grad.clamp(-group["clip_norm"], group["clip_norm"])  # type: ignore[union-attr]
        dim = getattr(p, "_pyro_dct_dim", None)
        if dim is not None:
            gradient = to_frequency(gradient, dim)
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(gradient))
        state["step"] += 1
        direction = _moments_(group, gradient, state["exp_avg"], state["exp_avg_sq"])
        if dim is not None:
            direction = from_frequency(direction, dim, p.size(dim))
        p.sub_(direction, alpha=_step_size(group, state["step"]))

    def _step_rows(self, group: dict[str, Any], p: Tensor, subsample: Mapping[int, Tensor]) -> None:
        """Steps the rows that were subsampled; those are taken out, stepped, and put back."""
        state = self.state[p]
        if not state:
            state.update({key: torch.zeros_like(p) for key in ("step", "exp_avg", "exp_avg_sq")})
        index = _rows(p, subsample)
        dim = getattr(p, "_pyro_dct_dim", None)
        if dim is not None:
            raise ValueError(
                "DCTAdam: a parameter with a time dimension is subsampled, and some of its times are missing in the "
                "transform. Set subsample_aware=False, or leave `_pyro_dct_dim` off."
            )
        gradient = p.grad[index].clamp(-group["clip_norm"], group["clip_norm"])  # type: ignore[index]
        step, mean, square = (state[key][index] for key in ("step", "exp_avg", "exp_avg_sq"))
        step += 1
        direction = _moments_(group, gradient, mean, square)
        beta1, beta2 = group["betas"]
        size = group["lr"] * (1 - beta2**step).sqrt() / (1 - beta1**step)
        for key, value in (("step", step), ("exp_avg", mean), ("exp_avg_sq", square)):
            state[key][index] = value
        p[index] -= size * direction


def to_frequency(x: Tensor, dim: int) -> Tensor:
    """Returns `x` and behind it, along `dim`, its cosine transform, padded to a length that transforms fast."""
    length = x.size(dim)
    padding = x.new_zeros(x.shape[:dim] + (next_fast_len(length) - length,) + x.shape[x.dim() + dim + 1 :])
    frequency: Tensor = dct(torch.cat([x, padding], dim), dim)
    return torch.cat([x, frequency], dim)


def from_frequency(y: Tensor, dim: int, length: int) -> Tensor:
    """Returns the part of `y` in time plus the inverse transform of the rest, both of `length` along `dim`."""
    time = y.narrow(dim, 0, length)
    padded: Tensor = idct(y.narrow(dim, length, y.size(dim) - length), dim)
    return time + padded.narrow(dim, 0, length)


def _moments_(group: dict[str, Any], gradient: Tensor, mean: Tensor, square: Tensor) -> Tensor:
    """Updates both moments in place and returns their quotient, the direction of Adam before bias correction."""
    beta1, beta2 = group["betas"]
    mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    eps: float = group["eps"]
    return mean / (square.sqrt() + eps)


def _step_size(group: dict[str, Any], step: int) -> float:
    beta1, beta2 = group["betas"]
    size: float = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return size


def _rows(p: Tensor, subsample: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
    """Indices of the elements of `p` that lie in the subsample along every dim that has one."""
    mask = torch.ones(p.shape, dtype=torch.bool, device=p.device)
    for dim, indices in subsample.items():
        inside = torch.zeros(p.size(dim), dtype=torch.bool, device=p.device)
        inside[indices] = True
        mask &= inside.view([-1 if d == dim % p.dim() else 1 for d in range(p.dim())])
    return mask.nonzero(as_tuple=True)

"""Adam on time series: in the time domain and, at once, in the frequency domain."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.optim.dct_adam
import torch
from pyro.ops.tensor_utils import dct, idct, next_fast_len
from torch import Tensor
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


class DCTAdam(pyro.optim.dct_adam.DCTAdam):  # type: ignore[misc]
    r"""ClippedAdam that steps parameters of time series in the frequency domain as well.

    A parameter that has an attribute `_pyro_dct_dim` (a negative dim, its time) is stepped by

    .. math::
        h = (g, C g), \qquad
        \theta \leftarrow \theta - \gamma_k\, (u_{\mathrm{time}} + C^{-1} u_{\mathrm{frequency}}),

    where :math:`C` is the orthonormal discrete cosine transform along time (padded with zeros to a length that
    transforms fast) and :math:`u` the direction of Adam for the gradient :math:`h`. So errors that are slow in time are
    corrected as quickly as those of single points.

    Args:
        params: Dense tensors, or torch parameter groups of them.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the square root of the second moment.
        clip_norm: Bound on the magnitude of each element of the gradient.
        lrd: Factor of the learning rate at each step.
        subsample_aware: Whether only those elements of a parameter are updated that its attribute `_pyro_subsample`
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
        defaults = adam_defaults("DCTAdam", lr=lr, betas=betas, eps=eps, clip_norm=clip_norm, lrd=lrd)
        Optimizer.__init__(self, params, defaults | {"subsample_aware": subsample_aware})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient; returns what `closure` returned."""
        loss = evaluated(closure)
        if rounds_each_operation(self.param_groups):
            super().step()
            return loss
        by_hyper: dict[tuple[Any, ...], list[tuple[Tensor, float]]] = defaultdict(list)
        for group in self.param_groups:
            group["lr"] *= group["lrd"]
            same = by_hyper[tuple(group["betas"]), group["eps"], group["clip_norm"]]
            for p in group["params"]:
                if p.grad is None:
                    continue
                subsample = getattr(p, "_pyro_subsample", {})
                if subsample and group["subsample_aware"]:
                    self._step_rows(group, p, subsample)
                else:
                    same.append((p, group["lr"]))

        for hyper, chosen in by_hyper.items():
            self._step_together(chosen, Hyper(*hyper))
        return loss

    def _step_together(self, chosen: Sequence[tuple[Tensor, float]], hyper: Hyper) -> None:
        """Steps parameters by lists; time series of one length and dtype are transformed as one matrix."""
        pending: list[PendingStep] = []
        series: dict[tuple[Any, ...], list[tuple[Tensor, float]]] = defaultdict(list)
        for p, lr in chosen:
            dim = getattr(p, "_pyro_dct_dim", None)
            if dim is not None:
                series[p.size(dim), p.dtype, p.device].append((p, lr))
            elif p.grad is not None:
                pending.append(PendingStep(p, p.grad, started(self.state[p], p), lr))

        if pending:
            step_all_(pending, hyper)
        for same in series.values():
            self._step_series([p for p, _ in same], [lr for _, lr in same], hyper)

    def _step_series(self, params: Sequence[Tensor], rates: Sequence[float], hyper: Hyper) -> None:
        """Steps time series of one length: their steps in time and frequency are taken from zero and then added.

        Adam's direction does not depend on the parameter, so the step of a tensor of zeros is that direction times the
        learning rate. The transform is linear: it is taken once, of the sum of all steps.
        """
        dims: list[int] = [p._pyro_dct_dim for p in params]  # type: ignore[attr-defined]
        length = params[0].size(dims[0])
        gradients = [p.grad.clamp_(-hyper.clip_norm, hyper.clip_norm) for p in params if p.grad is not None]
        rows = _as_rows(gradients, dims)  # (series of all parameters, time)
        pending = [
            PendingStep(torch.zeros_like(h), h, started(self.state[p], h), lr)
            for p, h, lr in zip(params, _as_tensors(to_frequency(rows, -1), params, dims), rates, strict=True)
        ]
        step_all_(pending, Hyper(hyper.betas, hyper.eps, math.inf))  # frequencies are not clipped
        moves = from_frequency(_as_rows([x.param for x in pending], dims), -1, length)
        torch._foreach_add_(list(params), _as_tensors(moves, params, dims))

    def _step_rows(self, group: dict[str, Any], p: Tensor, subsample: Mapping[int, Tensor]) -> None:
        """Steps the elements that were subsampled; those are taken out, stepped, and put back."""
        if getattr(p, "_pyro_dct_dim", None) is not None:
            raise ValueError(
                "DCTAdam: a parameter with a time dimension is subsampled, and some of its times are missing in the "
                "transform. Set subsample_aware=False, or leave `_pyro_dct_dim` off."
            )
        state = self.state[p]
        if not state:
            state.update({key: torch.zeros_like(p) for key in ("step", "exp_avg", "exp_avg_sq")})

        # As in pyro.optim.DCTAdam, element by element: `step` is a tensor, and an element that no minibatch has touched
        # keeps its number of steps, so that its first steps are corrected for their bias as those of any parameter.
        index = _rows(p, subsample)
        beta1, beta2 = group["betas"]
        gradient = p.grad[index].clamp(-group["clip_norm"], group["clip_norm"])  # type: ignore[index]
        step = state["step"][index] + 1
        mean = state["exp_avg"][index].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = state["exp_avg_sq"][index].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"] * (1 - beta2**step).sqrt() / (1 - beta1**step)
        for key, value in (("step", step), ("exp_avg", mean), ("exp_avg_sq", square)):
            state[key][index] = value
        p[index] -= size * mean / (square.sqrt() + group["eps"])


# A time series and its transform side by side, in one tensor twice as long, so that one step of Adam moves both.


def to_frequency(x: Tensor, dim: int) -> Tensor:
    """Returns `x` and behind it, along `dim`, its cosine transform, padded to a length that transforms fast."""
    length = x.size(dim)
    padding = x.new_zeros(x.shape[:dim] + (next_fast_len(length) - length,) + x.shape[x.dim() + dim + 1 :])
    frequency: Tensor = dct(torch.cat([x, padding], dim), dim)
    return torch.cat([x, frequency], dim)


def from_frequency(y: Tensor, dim: int, length: int) -> Tensor:
    """Returns what `y` has in time plus the inverse transform of the rest, both of `length` along `dim`."""
    time = y.narrow(dim, 0, length)
    padded: Tensor = idct(y.narrow(dim, length, y.size(dim) - length), dim)
    return time + padded.narrow(dim, 0, length)


def _as_rows(tensors: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
    """Returns all `tensors`, whose sizes along their `dims` are equal, as one matrix, those dims along its rows."""
    length = tensors[0].size(dims[0])
    return torch.cat([t.movedim(dim, -1).reshape(-1, length) for t, dim in zip(tensors, dims, strict=True)])


def _as_tensors(rows: Tensor, like: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """Undoes `_as_rows`: contiguous tensors, shaped as those in `like` but for their size along `dims`."""
    matrices = torch.split(rows, [t.numel() // t.size(dim) for t, dim in zip(like, dims, strict=True)])
    return [
        matrix.view(*t.movedim(dim, -1).shape[:-1], rows.size(-1)).movedim(-1, dim).contiguous()
        for matrix, t, dim in zip(matrices, like, dims, strict=True)
    ]


def _rows(p: Tensor, subsample: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
    """Indices of the elements of `p` that lie in the subsample along every dim that has one."""
    mask = torch.ones(p.shape, dtype=torch.bool, device=p.device)
    for dim, indices in subsample.items():
        inside = torch.zeros(p.size(dim), dtype=torch.bool, device=p.device)
        inside[indices] = True
        mask &= inside.view([-1 if d == dim % p.dim() else 1 for d in range(p.dim())])
    return mask.nonzero(as_tuple=True)

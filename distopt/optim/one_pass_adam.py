"""`torch.optim.Adam` and `AdamW` in one pass over memory, each element by itself and each parameter at its own step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from distopt.optim.kernels import AdamHyper, Pieces, compiled_adam_, has_kernel
from distopt.optim.trial import EXACT_DTYPES

_FEW = 4
"""Tensors of one number up to which one call for each takes less than one call for all."""


class _OnePass(torch.optim.Adam):
    """Steps by the compiled kernel what it takes, and the rest by torch's plain loop, one tensor at a time.

    Arguments and state are those of the class of torch. Whoever has chosen one of torch's implementations gets it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient; returns what `closure` returned."""
        if closure is not None or not all(map(_is_plain, self.param_groups)):
            return super().step(closure)
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return None

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float64 if _is_wide_default() else torch.float32)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
                if group["amsgrad"]:
                    state["max_exp_avg_sq"] = torch.zeros_like(p)

        largest = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        counts = [state["step"] for state in states]
        tensors = (
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            largest,
        )
        numbers = [count.item() + 1 for count in counts]
        pieces = Pieces(list(map(Tensor.numel, params)), numbers, [group["lr"]] * len(params))
        refused = compiled_adam_(tensors, pieces, hyper_of(group))
        for i in refused:
            _step_plainly(group, [each[i : i + 1] for each in tensors], counts[i : i + 1])
        taken = counts if not refused else [count for i, count in enumerate(counts) if i not in set(refused)]
        if len(taken) > _FEW:
            torch._foreach_add_(taken, 1)
        else:
            for count in taken:
                count.numpy()[()] += 1  # half of what `add_` takes


class OnePassAdam(_OnePass):
    """`torch.optim.Adam`, see `_OnePass`."""


class OnePassAdamW(_OnePass, torch.optim.AdamW):
    """`torch.optim.AdamW`, see `_OnePass`."""


def hyper_of(group: dict[str, Any]) -> AdamHyper:
    """Returns what the kernel is told of a torch parameter group of Adam or AdamW."""
    beta1, beta2 = group["betas"]
    return AdamHyper(
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        maximize=bool(group["maximize"]),
        is_decoupled=bool(group["decoupled_weight_decay"]),
    )


def _is_plain(group: dict[str, Any]) -> bool:
    """Returns whether no implementation of torch was chosen for a torch parameter group, and the kernel may step it."""
    if group["foreach"] or group["fused"] or group["capturable"] or group["differentiable"]:
        return False
    beta1, beta2 = group["betas"]
    if isinstance(group["lr"], Tensor) or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        return False
    stepped = [p for p in group["params"] if p.grad is not None]
    if not stepped:
        return True
    first = stepped[0]
    is_known = first.is_cpu and first.dtype in EXACT_DTYPES and has_kernel("cpu")
    return is_known and not any([p.grad.is_sparse for p in stepped])


def _is_wide_default() -> bool:
    return torch.get_default_dtype() is torch.float64  # torch counts in it, so that the count is exact for longer


def _step_plainly(group: dict[str, Any], tensors: Sequence[list[Tensor]], counts: list[Tensor]) -> None:
    params, grads, means, squares, largest = tensors
    beta1, beta2 = group["betas"]
    adam(
        params,
        grads,
        means,
        squares,
        largest,
        counts,
        foreach=False,
        fused=False,
        decoupled_weight_decay=bool(group["decoupled_weight_decay"]),
        has_complex=any(map(torch.is_complex, params)),
        amsgrad=group["amsgrad"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )

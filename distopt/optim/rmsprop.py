"""Torch's RMSprop in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distopt.optim.fused_adam import is_fusable, scaled_descent_


class OnePassRMSprop(torch.optim.RMSprop):
    """`torch.optim.RMSprop`, whose plain form (no momentum, not centered) is stepped by the fused kernel of Adam.

    Arguments and state are those of `torch.optim.RMSprop`; dense gradients may be overwritten.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient; returns what `closure` returned."""
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
            if closure is not None or not params or not _is_plain(group) or not is_fusable(params + grads):
                return super().step(closure)
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state["step"] = torch.zeros(())
                    state["square_avg"] = torch.zeros_like(p)
                state["step"] += 1
            scaled_descent_(
                params,
                grads,
                [s["square_avg"] for s in states],
                lr=group["lr"],
                decay=group["alpha"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
            )
        return None


def _is_plain(group: dict[str, Any]) -> bool:
    return (
        group["momentum"] == 0
        and not group["centered"]
        and not group["capturable"]
        and not group["differentiable"]
        and not isinstance(group["lr"], Tensor)
        and 0.0 < group["alpha"] < 1.0
    )

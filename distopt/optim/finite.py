"""The guard against gradients that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distopt.optim.plan import Plan


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether every element of all `tensors` is finite; one transfer from the device."""
    found = [torch.isfinite(t.coalesce()._values() if t.is_sparse else t).all() for t in tensors]
    return not found or bool(torch.stack([f.to(found[0].device) for f in found]).all())


def nonfinite_names(plan: Plan, buffers: Iterable[Tensor]) -> tuple[str, ...]:
    """Returns the names of the parameters whose gradient is not finite, sorted."""
    names = []
    for group, buffer in zip(plan.packed, buffers, strict=True):
        segments = torch.split(buffer, group.numels)
        names += [name for name, s in zip(group.names, segments, strict=True) if not all_finite([s])]
    for _, members in plan.listed:
        names += [m.name for m in members if m.param.grad is not None and not all_finite([m.param.grad])]
    return tuple(sorted(names))

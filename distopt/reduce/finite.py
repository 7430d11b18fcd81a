"""Which rank's gradients are not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.reduce.parts import Brought


def is_finite(gradient: Tensor) -> bool:
    """Returns whether a gradient, dense or sparse, holds neither NaN nor infinity."""
    values = gradient._values() if gradient.is_sparse else gradient
    # A finite sum has finite terms, and takes no copy as isfinite() does; the sum alone may overflow.
    return bool(torch.isfinite(values.sum()) or torch.isfinite(values).all())


def explain_nonfinite(backend: Backend, names: Sequence[str], brought: Brought | None, step: int) -> str:
    """Names ranks and parameters; a collective call, which all ranks make since all have seen the sum.

    Args:
        backend: Link to the other ranks.
        names: Of the layout's parameters.
        brought: What this rank gave; None when it only took part.
        step: For the message.
    """
    own: list[str] = []
    if brought is not None:
        gradients = [
            *zip(names, brought.gradients, strict=True),
            *((name, gradient) for name, _, gradient in brought.own),
        ]
        own = [name for name, gradient in gradients if gradient is not None and not is_finite(gradient)]
    told = backend.all_gather_json(own)
    found = [f"rank {rank}: {', '.join(map(repr, each))}" for rank, each in enumerate(told) if each]
    said = "; ".join(found) or "on no rank by itself, so the sum overflowed"
    return f"step {step}: gradients that are not finite: {said}."

"""Clipping of gradients: per parameter by norm or value, and by one norm over all parameters.

Norms of single parameters are computed in the parameters' dtype, as torch and Pyro do, so that trajectories equal
theirs. The norm over all parameters, which Pyro does not have, is computed in float64: sums over ranks and over groups
in any order then give the same float32 factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Numbers go to a device by copies that do not block: one that blocks waits until the device has done all that was
# started before, and the pipeline runs dry. Pageable memory of the host may be reused at once in both cases.

_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class Clip:
    """What `clip_args` asks for one parameter; None leaves that kind of clipping out."""

    clip_norm: float | None = None
    clip_value: float | None = None
    global_norm: float | None = None

    @classmethod
    def of(cls, args: Mapping[str, Any], name: str) -> Clip:
        """Reads the dict a user gave for parameter `name`; raises ValueError on unknown keys or values below zero."""
        known = {"clip_norm", "clip_value", "global_norm"}
        if unknown := sorted(set(args) - known):
            raise ValueError(f"clip_args of parameter {name!r}: unknown key {unknown[0]!r}. Known: {sorted(known)}.")
        for key, value in args.items():
            if value is not None and (math.isnan(value) or value < 0):
                raise ValueError(f"clip_args of parameter {name!r}: {key} is {value}, expected a number >= 0.")
        return cls(**args)

    @property
    def per_parameter(self) -> bool:
        """Whether each parameter's gradient is clipped separately."""
        return self.clip_norm is not None or self.clip_value is not None


@cache
def cached_clip(clip: Clip) -> Clip:
    """Returns the first of all equal limits, so that they can be compared by identity."""
    return clip


def clip_by_norm_(buffer: Tensor, numels: Sequence[int], max_norm: float) -> bool:
    """Scales each segment of `buffer` down to a 2-norm of at most `max_norm`, in place; returns whether one changed.

    Args:
        buffer: Shape (sum(numels),).
        numels: Length of each segment.
        max_norm: As in `torch.nn.utils.clip_grad_norm_`, whose coefficient `max_norm / (norm + 1e-6)` is used.
    """
    # As many norms as segments from one call, and one multiplication of the whole buffer: the coefficients are spread
    # over the elements instead of looping over the segments.
    segments = [s for s in torch.split(buffer, list(numels)) if s.numel()]
    norms = torch.stack(torch._foreach_norm(segments))
    coefficients = (max_norm / (norms + _EPS)).clamp_(max=1.0)
    lengths = torch.tensor([s.numel() for s in segments]).to(buffer.device, non_blocking=True)
    buffer.mul_(coefficients.repeat_interleave(lengths, output_size=buffer.numel()))
    return _may_change(coefficients)


def clip_each_(gradients: Iterable[Tensor], clip: Clip) -> None:
    """Clips each gradient by itself, in place: first its norm, then its elements, as `pyro.optim` does."""
    for g in gradients:
        values = g._values() if g.is_sparse else g
        if clip.clip_norm is not None and values.numel():
            norm = torch.linalg.vector_norm(values)
            values.mul_((clip.clip_norm / (norm + _EPS)).clamp(max=1.0))
        if clip.clip_value is not None:
            values.clamp_(-clip.clip_value, clip.clip_value)


def clip_segments_(buffer: Tensor, numels: Sequence[int], clip: Clip) -> bool:
    """Clips each segment of `buffer` by itself, in place: first its norm, then its elements.

    Returns:
        Whether an element changed; on a device other than the CPU True, since the answer would have to be waited for.
    """
    if not buffer.numel():
        return False
    changed = clip.clip_norm is not None and clip_by_norm_(buffer, numels, clip.clip_norm)
    if clip.clip_value is not None:
        changed = changed or _may_change(clip.clip_value / buffer.abs().max())
        buffer.clamp_(-clip.clip_value, clip.clip_value)
    return changed


# Clipped gradients are copied back to `.grad` only where clipping has changed them. On the CPU to ask costs less than
# the copy. On a GPU the answer would have to be waited for, which stops the pipeline, so there they are always copied.


def _may_change(coefficients: Tensor) -> bool:
    """Returns whether a gradient that is scaled by `coefficients` changes; True where the answer is on a device."""
    return coefficients.device.type != "cpu" or not bool((coefficients >= 1.0).all())


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the 2-norm of all `gradients` together, as a float64 scalar on the first one's device."""
    total: Tensor | None = None
    for g in gradients:
        values = (g.coalesce()._values() if g.is_sparse else g).reshape(-1)
        square = torch.linalg.vector_norm(values, dtype=_wide(values.dtype)).double() ** 2
        total = square if total is None else total + square.to(total.device)
    return torch.zeros((), dtype=torch.float64) if total is None else total.sqrt()


def clip_by_global_norm_(gradients: Sequence[Tensor], max_norm: float, total: float | None = None) -> bool:
    """Scales all `gradients` by one factor so that their common 2-norm is at most `max_norm`.

    Args:
        gradients: Scaled in place.
        max_norm: Of what it is after scaling.
        total: The norm before, where more gradients count than those at hand.

    Returns:
        Whether they changed; on a device other than the CPU True, since the answer would have to be waited for.
    """
    norm = global_norm(gradients) if total is None else torch.tensor(total, dtype=torch.float64)
    coefficient = (max_norm / (norm + _EPS)).clamp(max=1.0)
    for g in gradients:
        dtype = g.real.dtype if g.is_complex() else g.dtype
        g.mul_(coefficient.to(device=g.device, dtype=dtype, non_blocking=True))
    return _may_change(coefficient)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float64, or complex128 for complex numbers: the dtype in which squares are summed."""
    return torch.complex128 if dtype.is_complex else torch.float64

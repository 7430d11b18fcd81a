"""Checksums by which replicas that must be equal are watched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.reduce.errors import DriftError
from distopt.reduce.messages import DIGIT, NUM_CHECKSUM_DIGITS, Brought

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksum(tensor: Tensor) -> int:
    """Returns the sum of a tensor's elements taken as whole numbers: any one flipped bit changes it."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if real.is_sparse:
        real = real.to_dense()
    bits = real.contiguous().view(-1).view(_BITS[real.dtype.itemsize])
    return int(bits.sum(dtype=torch.int64))


def state_checksum(state: Any) -> str:
    """Returns a digest of nested optimizer state: its tensors by their bits, numbers and texts as they are."""
    return hashlib.blake2b(json.dumps(_plain(state)).encode(), digest_size=8).hexdigest()


def checksums(params: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Returns (checksum of the value, digest of the optimizer's state) by parameter name."""
    return {name: (tensor_checksum(param), state_checksum(state.get(name))) for name, param in params}


def fold(sums: Mapping[str, tuple[int, str]]) -> int:
    """Returns all of them as one number of `NUM_CHECKSUM_DIGITS` digits."""
    digest = hashlib.blake2b(json.dumps(sorted(sums.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % int(DIGIT**NUM_CHECKSUM_DIGITS)


def explain_drift(backend: Backend, sums: Mapping[str, tuple[int, str]], step: int) -> DriftError:
    """Returns the error that names the first parameter that differs, and which ranks hold what; a collective call."""
    told = backend.all_gather_json(sums)
    for name in sorted({name for each in told for name in each}):
        for place, what in enumerate(("value", "optimizer state")):
            values = [str(each[name][place]) if name in each else "absent" for each in told]
            if len(set(values)) > 1:
                return DriftError(
                    f"rank {backend.rank} of {backend.world_size}, step {step}: the replicas have drifted apart. First "
                    f"difference: {what} of parameter {name!r}: {_sides(values)}. Restart from the last checkpoint; if "
                    "it comes back, look for code that changes parameters on some ranks only, or for faulty memory."
                )
    return DriftError(f"step {step}: the replicas' checksums differed, and agree again when looked at closely.")


def _sides(values: Sequence[str]) -> str:
    sides: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        sides.setdefault(value, []).append(str(rank))
    return " against ".join(f"rank {', '.join(ranks)}" for ranks in sides.values())


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), tensor_checksum(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


# Which rank's gradients are not finite.


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

"""Checksums by which replicas that must be equal are watched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.reduce.control import DIGIT, NUM_CHECKSUM_DIGITS
from distopt.reduce.errors import DriftError

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

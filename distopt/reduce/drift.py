"""Comparison of replicas by checksums, and which ranks have a gradient that is not finite.

What every rank must hold alike, the replicated parameters and their optimizer state, is compared bit by bit without
sending it: a checksum of all of it is reduced with the gradients. Only if it differs are the checksums of each
parameter sent, to name the first one that does. The cost is one pass over parameters and state in the steps that
compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.nonfinite import is_finite
from distopt.reduce.errors import DriftError, ranks_by_value
from distopt.reduce.gradients import LocalGradients
from distopt.reduce.layout import Bucket, Layout
from distopt.reduce.messages import BASE, NUM_CHECKSUM_DIGITS

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Returns the sum of each tensor's elements taken as whole numbers: any one flipped bit changes it.

    Cost:
        One pass over the tensors, and one transfer to the host for each device that they are on.
    """
    sums = [_bit_sum(tensor) for tensor in tensors]
    on_host: list[int] = [0] * len(sums)
    for device in {each.device for each in sums}:
        indices = [index for index, each in enumerate(sums) if each.device == device]
        for index, number in zip(indices, torch.stack([sums[index] for index in indices]).tolist(), strict=True):
            on_host[index] = number
    return on_host


def _bit_sum(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if real.is_sparse:
        real = real.to_dense()
    bits = real.contiguous().view(-1).view(_INTEGER_OF_SIZE[real.dtype.itemsize])
    return bits.sum(dtype=torch.int64)


def state_checksum(state: Any) -> str:
    """Returns a digest of nested optimizer state: its tensors by their bits, numbers and texts as they are."""
    return _digest(state, iter(tensor_checksums(list(_tensors(state)))))


def checksums(params: Iterable[tuple[str, Tensor]], state: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Returns (checksum of the value, digest of the optimizer's state) by parameter name."""
    pairs = [(name, param, state.get(name)) for name, param in params]
    tensors = [tensor for _, param, of_param in pairs for tensor in (param, *_tensors(of_param))]
    sums = iter(tensor_checksums(tensors))
    return {name: (next(sums), _digest(of_param, sums)) for name, _, of_param in pairs}


def combine_checksums(sums: Mapping[str, tuple[int, str]]) -> int:
    """Returns one number of `NUM_CHECKSUM_DIGITS` digits in base 64 that stands for all of them."""
    digest = hashlib.blake2b(json.dumps(sorted(sums.items())).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % int(BASE**NUM_CHECKSUM_DIGITS)


def explain_drift(backend: Backend, sums: Mapping[str, tuple[int, str]], step: int) -> DriftError:
    """Returns the error that names the first parameter that differs, and the ranks on each side.

    Cost:
        One gather of JSON; every rank calls it.
    """
    sums_by_rank = backend.all_gather_json(sums)
    for name in sorted({name for each in sums_by_rank for name in each}):
        for index, quantity in enumerate(("value", "optimizer state")):
            values = {r: str(each[name][index]) if name in each else "absent" for r, each in enumerate(sums_by_rank)}
            sides = ranks_by_value(values)
            if len(sides) > 1:
                return DriftError(
                    f"rank {backend.rank} of {backend.world_size}, step {step}: the replicas have drifted apart. First "
                    f"difference: {quantity} of parameter {name!r}: {' against '.join(sides.values())}. Restart from "
                    "the last checkpoint; if it comes back, look for code that changes parameters on some ranks only, "
                    "or for faulty memory."
                )
    return DriftError(f"step {step}: the replicas' checksums differed, and are equal now that they are compared again.")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested state in the order in which `_as_json` comes to them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _digest(state: Any, sums: Iterator[int]) -> str:
    """Returns a digest of nested state, whose tensors' checksums are next in `sums`."""
    return hashlib.blake2b(json.dumps(_as_json(state, sums)).encode(), digest_size=8).hexdigest()


def _as_json(value: Any, sums: Iterator[int]) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), next(sums)]
    if isinstance(value, Mapping):
        return {str(key): _as_json(item, sums) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item, sums) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


class NonfiniteNames(NamedTuple):
    """Names of parameters whose gradient is not finite.

    Attributes:
        of_rank: Those of this rank's gradients.
        summed: Those of which this rank has but the sum over ranks, which has overwritten its gradient.
    """

    of_rank: list[str]
    summed: list[str]


def find_nonfinite(
    layout: Layout, saved: Collection[Bucket], local: LocalGradients | None, num_ranks: int
) -> NonfiniteNames:
    """Returns which of the gradients that this rank brought to a reduction are not finite.

    Args:
        layout: What was reduced.
        saved: The buckets whose gradients were copied aside before.
        local: What this rank gave; None if it only took part.
        num_ranks: How many ranks were summed over.
    """
    of_rank: list[str] = []
    summed: list[str] = []
    if local is None:
        return NonfiniteNames(of_rank, summed)
    gradients = list(local.gradients)
    for index, gradient in chain.from_iterable(bucket.saved_gradients() for bucket in saved):
        gradients[index] = gradient
    lost = {index for bucket in layout.buckets for index in bucket.held(gradients)} if num_ranks > 1 else set()

    for index, (name, each) in enumerate(zip(layout.names, gradients, strict=True)):
        if each is not None and not is_finite(each):
            (summed if index in lost else of_rank).append(name)
    of_rank += [name for name, _, each in local.rank_local if not is_finite(each)]
    return NonfiniteNames(of_rank, summed)


def explain_nonfinite(backend: Backend, nonfinite: NonfiniteNames, step: int) -> str:
    """Returns a sentence that names the ranks and parameters with a gradient that is not finite.

    Args:
        backend: Link to the other ranks.
        nonfinite: What `find_nonfinite` has returned on this rank.
        step: The step, for the sentence.

    Cost:
        One gather of JSON; every rank calls it, since all have seen the sum.
    """
    by_rank = [NonfiniteNames(*each) for each in backend.all_gather_json(nonfinite)]
    causes = [f"rank {rank}: {', '.join(map(repr, each.of_rank))}" for rank, each in enumerate(by_rank) if each.of_rank]
    unclear = {name for each in by_rank for name in each.summed} - {name for each in by_rank for name in each.of_rank}
    if unclear:
        ranks = ", ".join(str(rank) for rank, each in enumerate(by_rank) if unclear.intersection(each.summed))
        causes.append(f"on one or more of ranks {ranks}: {', '.join(map(repr, sorted(unclear)))}")
    listed = "; ".join(causes) or "on no rank by itself, so the sum overflowed"
    return f"step {step}: gradients that are not finite: {listed}."

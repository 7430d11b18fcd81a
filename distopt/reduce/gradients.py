"""What goes into a reduction and what comes out of it: this rank's gradients, and those that all ranks step by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter, eq
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distopt.optim.clipping import Gradients, exact_sum, global_norm
from distopt.optim.packing import FlatGradients, same
from distopt.reduce.layout import AVERAGE_PREFIX, LARGE_NUMEL, Bucket, Layout, ParamSpec
from distopt.reduce.messages import PASSED, RoundSummary
from distopt.reduce.running_averages import RunningAverages
from distopt.sharding import any_local, local_parameter, num_shards

NamedGradient: TypeAlias = tuple[str, Tensor, Tensor]
"""A parameter's name, the parameter, and its gradient."""

gradient_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")

_MAX_PATTERNS = 64  # of which parameters are touched: enough for a model whose minibatches alternate


@dataclass
class LocalGradients:
    """What one rank brings to a reduction.

    Attributes:
        params: The unconstrained tensors of this call.
        gradients: By index in the layout; None where this rank has none.
        complete: Whether no gradient is None and none is sparse.
        addresses: Memory address of each gradient; None if one is missing or sparse, or if they were not looked up.
        changes: Parameters that the layout lacks or holds otherwise, with their gradients, by name.
        rank_local: The gradients of parameters that belong to this rank alone.
        missing: Indices in the layout of parameters of this call without a gradient.
        rank_local_missing: Name and tensor of those that belong to this rank alone.
        num_summed: Over how many ranks the shared gradients are summed and not averaged; 1 for a mean.
    """

    params: Sequence[Tensor] = ()
    gradients: list[Tensor | None] = field(default_factory=list)
    complete: bool = False
    addresses: list[int] | None = None
    changes: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    rank_local: list[NamedGradient] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    rank_local_missing: list[tuple[str, Tensor]] = field(default_factory=list)
    num_summed: int = 1

    def extended(self, of_new: LocalGradients) -> LocalGradients:
        """Returns these gradients and those of new parameters, which the layout has behind the others."""
        first = len(self.gradients)
        return replace(
            self,
            gradients=[*self.gradients, *of_new.gradients],
            complete=self.complete and of_new.complete,
            addresses=None,  # those of gradients that were moved out of buckets have changed
            changes={},
            missing=[*self.missing, *(first + index for index in of_new.missing)],
        )

    def rank_local_square(self) -> float:
        """Returns the squared 2-norm of the rank-local gradients, as they will be stepped by."""
        norms = [float(global_norm([Gradients(g)])) / self._divisor(param) for _, param, g in self.rank_local]
        return exact_sum([norm * norm for norm in norms])

    def scale_rank_local_(self) -> list[NamedGradient]:
        """Divides the rank-local gradients, in place, to be of one scale with the shared ones; returns them."""
        for _, param, gradient in self.rank_local:
            divisor = self._divisor(param)
            if divisor != 1:
                gradient.div_(divisor)
        return self.rank_local

    def _divisor(self, param: Tensor) -> float:
        # The density of its plate was multiplied by the number of shards; a sum over ranks is that much larger again.
        return num_shards(param) / self.num_summed


@dataclass
class ReducedGradients:
    """The gradients to step by, and what the ranks have told each other.

    Attributes:
        summary: The ranks' messages, summed.
        local: What this rank gave; None if it only took part.
        dense: Gradients equal on all ranks, packed; in the steady state with the same tuples at each step.
        loose: Gradients equal on all ranks that are not packed.
        rank_local: Gradients of parameters that belong to this rank alone.
        missing: Name and tensor of parameters that were passed without a gradient on any rank.
    """

    summary: RoundSummary
    local: LocalGradients | None = None
    dense: list[FlatGradients] = field(default_factory=list)
    loose: list[NamedGradient] = field(default_factory=list)
    rank_local: list[NamedGradient] = field(default_factory=list)
    missing: list[tuple[str, Tensor]] = field(default_factory=list)

    def norm(self) -> float:
        """Returns the 2-norm of the gradients that are equal on all ranks, the same bits on each."""
        dense = [Gradients(flat.buffer, [p.numel() for p in flat.params]) for flat in self.dense]
        return float(global_norm(dense + [Gradients(gradient) for _, _, gradient in self.loose]))


class DroppedGradients:
    """Gradients set to zero. Large ones are dropped: what backward leaves next then needs no sum and no zeros."""

    def __init__(self) -> None:
        self._params: Any = WeakTensorKeyDictionary()

    def zero_(self, params: Iterable[Tensor]) -> None:
        """Sets the gradient of each parameter that has one to zero; small ones in place."""
        small = []
        for param in params:
            gradient = param.grad
            if gradient is None:
                continue
            if gradient.numel() >= LARGE_NUMEL:
                param.grad = None
                self._params[param] = True
            elif gradient.requires_grad or gradient.is_sparse:
                param.grad = torch.zeros_like(gradient)
            else:
                small.append(gradient)
        if small:
            torch._foreach_zero_(small)

    def restore(self, params: Iterable[Tensor]) -> None:
        """Gives zeros to those of `params` whose gradient was dropped and that got none since."""
        for param in params:
            if param.grad is None and param in self._params:
                param.grad = torch.zeros_like(param)


# Collecting gradients. A model of a thousand parameters passes here in each step, so the usual case, all parameters of
# the layout with a dense gradient each and perhaps new ones, is recognised by loops that run inside the interpreter
# (`map`), which takes 0.2 ms for them. Whatever differs from it (a parameter missing, replaced, sparse) is sorted out
# one by one, which takes five times as long.


def collect_gradients(
    params: Iterable[Tensor], layout: Layout, dropped: DroppedGradients, averages: RunningAverages
) -> LocalGradients:
    """Returns this rank's gradients, and the parameters that the layout does not know yet.

    Args:
        params: This rank's unconstrained tensors.
        layout: What all ranks know.
        dropped: What `zero_grad` has dropped; such gradients count as zero.
        averages: Takes note of those that the loss has set.

    Raises:
        ValueError: A parameter is not in Pyro's store, so that the ranks cannot identify it.
    """
    params = list(params)
    if not any_local():
        return _collect_shared(params, layout, dropped, averages)

    shared = [param for param in params if local_parameter(param) is None]
    local = _collect_shared(shared, layout, dropped, averages)
    rank_local = [param for param in params if local_parameter(param) is not None]
    dropped.restore(rank_local)
    # By name, since Pyro hands over a set: sums over them, and their order in packed memory, must not follow from where
    # in memory they are.
    named = sorted((_name_of(param), index) for index, param in enumerate(rank_local))
    local.rank_local = [
        (name, rank_local[index], gradient) for name, index in named if (gradient := rank_local[index].grad) is not None
    ]
    local.rank_local_missing = [(name, rank_local[index]) for name, index in named if rank_local[index].grad is None]
    local.params = [*local.params, *rank_local]
    return local


def _collect_shared(
    params: Sequence[Tensor], layout: Layout, dropped: DroppedGradients, averages: RunningAverages
) -> LocalGradients:
    indices = list(map(layout.index.get, map(id, params)))
    known = set(indices)
    has_new = None in known
    has_all = len(known) - has_new == len(layout.params) and not layout.sparse
    if has_all and _is_in_store(layout) and not _cast_params(layout):
        new = [param for param, index in zip(params, indices, strict=True) if index is None] if has_new else []
        changes = _new_gradients(new, layout, dropped) if new else {}
        gradients = list(map(gradient_of, layout.params))
        addresses = _addresses(gradients)
        if addresses is not None and changes is not None:
            return LocalGradients(params, gradients, complete=True, addresses=addresses, changes=changes)
    return _collect_one_by_one(params, layout, dropped, averages)


def _new_gradients(
    new: Sequence[Tensor], layout: Layout, dropped: DroppedGradients
) -> dict[str, tuple[Tensor, Tensor | None]] | None:
    """Returns the gradients of parameters that the layout lacks; None if one is an average or has a known name."""
    dropped.restore(new)
    changes = {_name_of(param): (param, param.grad) for param in new}
    if any(name.startswith(AVERAGE_PREFIX) or layout.has_name(name) for name in changes):
        return None
    return changes


def _collect_one_by_one(
    params: Sequence[Tensor], layout: Layout, dropped: DroppedGradients, averages: RunningAverages
) -> LocalGradients:
    dropped.restore(params)
    held = map(pyro.get_param_store().named_parameters().mapping.get, layout.names)
    is_current = not layout.sparse and not layout.averages and same(tuple(held), layout.params)
    cast = _cast_params(layout)
    params = list(params)
    local = LocalGradients(params, [None] * len(layout.params))
    indices = list(map(layout.index.get, map(id, params)))
    for position, (param, index) in enumerate(zip(tuple(params), indices, strict=True)):
        if index is not None and is_current and index not in cast:
            local.gradients[index] = param.grad
            if param.grad is None:
                local.missing.append(index)
            continue

        name = _name_of(param)
        # An average has no gradient, so a step that has one always comes here.
        if name.startswith(AVERAGE_PREFIX):
            param = averages.take(name, param, layout)
            params[position] = param
            index = layout.index.get(id(param))
        gradient = param.grad
        if (
            index is None
            or index in cast
            or layout.names[index] != name
            or _became_dense(layout.specs[index], gradient)
        ):
            local.changes[name] = (param, gradient)
        else:
            local.gradients[index] = gradient
            if gradient is None and not name.startswith(AVERAGE_PREFIX):
                local.missing.append(index)

    local.addresses = _addresses(local.gradients)
    local.complete = not layout.sparse and local.addresses is not None
    return local


def changed_gradients(local: LocalGradients, layout: Layout) -> LocalGradients:
    """Returns those of this rank's gradients that are of a layout of new parameters."""
    gradients = []
    missing = []
    for index, (name, param) in enumerate(zip(layout.names, layout.params, strict=True)):
        is_passed = local.changes.get(name, (None, None))[0] is param
        gradients.append(param.grad if is_passed else None)  # one that was not passed may be left of a call before
        if is_passed and param.grad is None:
            missing.append(index)
    is_complete = all(each is not None and not each.is_sparse for each in gradients)
    return LocalGradients(gradients=gradients, complete=is_complete, missing=missing)


def _name_of(param: Tensor) -> str:
    name: str | None = pyro.get_param_store().param_name(param)
    if name is None:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is not in Pyro's parameter store, so the ranks cannot tell "
            "which it is. Register it by pyro.param or pyro.module."
        )
    return name


def _is_in_store(layout: Layout) -> bool:
    # A cleared or replaced store lets go of all names at once, so one name answers for them all.
    return not layout.params or pyro.get_param_store().param_name(layout.params[0]) == layout.names[0]


def _cast_params(layout: Layout) -> set[int]:
    """Returns the indices of parameters that now have another dtype or device, as after `module.double()`.

    Of the dtypes all are looked at, since a part of a model may be cast alone; of the devices the first in each bucket,
    as one that computes on several devices would have to say so.
    """
    if not any(_may_be_cast(layout, bucket) for bucket in layout.buckets if bucket.indices):
        return set()
    return set(filter(partial(_is_cast, layout), range(len(layout.params))))


def _may_be_cast(layout: Layout, bucket: Bucket) -> bool:
    is_whole = len(bucket.indices) == len(layout.params)
    params = layout.params if is_whole else map(layout.params.__getitem__, bucket.indices)
    return set(map(_dtype_of, params)) != {bucket.specs[0].dtype} or _is_cast(layout, bucket.indices[0])


def _is_cast(layout: Layout, index: int) -> bool:
    param, spec = layout.params[index], layout.specs[index]
    return param.dtype is not spec.dtype or param.device.type != spec.device


def _became_dense(spec: ParamSpec, gradient: Tensor | None) -> bool:
    return spec.sparse and gradient is not None and not gradient.is_sparse


def _addresses(gradients: Sequence[Tensor | None]) -> list[int] | None:
    """Returns the memory address of each gradient; None if one is missing or sparse."""
    try:
        return list(map(Tensor.data_ptr, gradients))  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # None has no address, nor has a sparse tensor
        return None


@torch.no_grad()
def move_out_of_buckets_(layout: Layout, local: LocalGradients, besides: Sequence[Bucket] = ()) -> None:
    """Gives each parameter whose gradient lies in a bucket a copy of it, but for some buckets.

    The optimizer leaves views of the buckets as gradients, and where these are zeroed in place, the next backward pass
    accumulates there. A round overwrites the buckets and may then find that it has to be made again, for which the
    gradients must still be there.
    """
    for param, gradient in local.changes.values():
        if gradient is not None and layout.params:
            param.grad = gradient.clone()

    gradients = local.gradients
    addresses = local.addresses or [0 if each is None or each.is_sparse else each.data_ptr() for each in gradients]
    for bucket in layout.buckets:
        if bucket in besides:
            continue
        in_bucket = list(map(addresses.__getitem__, bucket.indices))
        if not bucket.may_hold(in_bucket) or not any(map(eq, in_bucket, bucket.addresses)):
            continue
        for index, address, view_address in zip(bucket.indices, in_bucket, bucket.addresses, strict=True):
            gradient = gradients[index]
            if address == view_address and gradient is not None:
                gradients[index] = layout.params[index].grad = gradient.clone()


def keep_gradients_(layout: Layout, local: LocalGradients, *, is_safe: bool) -> list[Bucket]:
    """Sees to it that gradients survive a round that overwrites the buckets and may have to be made again.

    Those that fill a bucket as a whole, as a captured step leaves them, are copied aside in one piece.

    Args:
        layout: The buckets.
        local: This rank's gradients.
        is_safe: Whether the round leaves such buckets as they are.

    Returns:
        The buckets whose gradients were copied aside, to be restored where the round has to be made again.
    """
    whole: list[Bucket] = []
    if local.complete and not local.changes:
        whole = [bucket for bucket in layout.buckets if bucket.holds(local.addresses)]
    if len(whole) < len(layout.buckets):
        move_out_of_buckets_(layout, local, besides=whole)

    saved = [] if is_safe else whole
    for bucket in saved:
        bucket.save_()
    return saved


def touched_slots(local: LocalGradients) -> float | list[float]:
    """Returns what this rank tells of each parameter of the layout: that it has a gradient, or passes it without."""
    if local.complete:
        return 1.0
    slots = [float(gradient is not None) for gradient in local.gradients]
    for index in local.missing:
        slots[index] = PASSED
    return slots


def zero_in_buckets_(params: Sequence[Tensor], layout: Layout) -> bool:
    """Zeroes all buckets if they hold the gradients of exactly `params`, none of them large; returns whether they do.

    One call then does what takes one for each parameter.
    """
    buckets = [bucket for bucket in layout.buckets if bucket.indices]
    if len(params) != len(layout.params) or any(bucket.max_numel >= LARGE_NUMEL for bucket in buckets):
        return False
    addresses = _addresses(list(map(gradient_of, layout.params)))
    if not all(map(layout.index.__contains__, map(id, params))):
        return False
    if not all(bucket.holds(addresses) for bucket in buckets):
        return False
    for bucket in buckets:
        bucket.flat.zero_()
    return True


class BucketReader:
    """Hands out the reduced gradients of a layout's buckets.

    The optimizer recognises its packed groups by the identity of the tuples in `FlatGradients`, so the same ones are
    handed out whenever the same parameters were touched. Nothing is copied while buckets are touched as a whole.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._whole: list[FlatGradients] | None = None
        self._patterns: dict[tuple[bool, ...], list[tuple[Bucket, list[int], FlatGradients]]] = {}

    def read(self, touched: Sequence[float]) -> tuple[list[FlatGradients], list[NamedGradient]]:
        """Returns the gradients of the dense parameters that some rank has touched: packed ones, and the others."""
        buckets = self._layout.buckets
        if not self._layout.sparse and min(touched, default=0) and not any(bucket.is_complex for bucket in buckets):
            if self._whole is None:
                self._whole = [self._pack(bucket, range(len(bucket.names))) for bucket in buckets if bucket.names]
            return self._whole, []

        dense: list[FlatGradients] = []
        loose: list[NamedGradient] = []
        for bucket, members, flat in self._pattern(tuple(count > 0 for count in touched)):
            if len(members) == len(bucket.names) and not bucket.is_complex:
                dense.append(flat)
                continue
            views = [bucket.views[member] for member in members]
            if bucket.is_complex or bucket.is_large:
                loose += zip(flat.names, flat.params, views, strict=True)
            else:
                packed = torch.cat([view.reshape(-1) for view in views])
                dense.append(FlatGradients(flat.names, flat.params, packed))
        return dense, loose

    def _pattern(self, touched: tuple[bool, ...]) -> list[tuple[Bucket, list[int], FlatGradients]]:
        """Returns which members of each bucket are touched, as the same tuples each time."""
        pattern = self._patterns.get(touched)
        if pattern is None:
            pattern = []
            for bucket in self._layout.buckets:
                members = [member for member, index in enumerate(bucket.indices) if touched[index]]
                if members:
                    pattern.append((bucket, members, self._pack(bucket, members)))
            if len(self._patterns) >= _MAX_PATTERNS:
                self._patterns.clear()
            self._patterns[touched] = pattern
        return pattern

    def _pack(self, bucket: Bucket, members: Sequence[int]) -> FlatGradients:
        layout = self._layout
        if len(members) == len(layout.names):  # all of them in one bucket, which then has their order
            return FlatGradients(layout.names, layout.params, bucket.flat)
        indices = [bucket.indices[member] for member in members]
        names, params = tuple(layout.names[i] for i in indices), tuple(layout.params[i] for i in indices)
        return FlatGradients(names, params, bucket.flat)

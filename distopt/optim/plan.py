"""What one call of the optimizer does, worked out once and used for as long as the calls are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from distopt.optim.groups import ListGroup, Member, PackedGroup
from distopt.optim.packing import FlatGradients, has_dense_gradients, places, same


class Plan:
    """The groups that a call with certain parameters steps.

    Args:
        tensors: the parameters as they were handed over.
        members: those of them that have a gradient.
        missing: those that have none.
    """

    def __init__(self, tensors: tuple[Tensor, ...], members: Sequence[Member], missing: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.missing = list(missing)
        by_group: dict[int, list[Member]] = defaultdict(list)
        for m in members:
            by_group[id(m.group)].append(m)
        groups = {i: mates[0].group for i, mates in by_group.items()}
        self.packed = [g for g in groups.values() if isinstance(g, PackedGroup)]
        self.listed = [(g, by_group[i]) for i, g in groups.items() if isinstance(g, ListGroup)]
        self._listed = tuple(m.param for _, members in self.listed for m in members)
        self._places = places(self._listed)
        clips = {id(m.clip): m.clip for m in members}.values()
        self.clips = any(c.per_parameter for c in clips)
        self.norms = sorted({c.global_norm for c in clips if c.global_norm is not None})

    def fits(self, tensors: tuple[Tensor, ...]) -> bool:
        """Returns whether this is still the plan for `tensors`: the same ones, where they were, with gradients."""
        return (
            same(tensors, self.tensors)
            and all(p.grad is None for p in self.missing)
            and places(self._listed) == self._places
        )

    def gradients(self, buffers: Sequence[Tensor], global_norm: float | None = None) -> list[Tensor]:
        """Returns all gradients, those of packed groups as one each; with `global_norm` only those clipped by it."""
        chosen = [b for g, b in zip(self.packed, buffers, strict=True) if global_norm in (None, g.clip.global_norm)]
        listed = [m for _, members in self.listed for m in members if global_norm in (None, m.clip.global_norm)]
        return chosen + [m.param.grad for m in listed if m.param.grad is not None]

    def gathered(self) -> list[Tensor] | None:
        """Copies the `.grad` of the packed groups' parameters side by side.

        Returns:
            One buffer per packed group; None when some gradient is missing or sparse, or a parameter was moved, so that
            a new plan is needed.
        """
        if not has_dense_gradients(self._listed):
            for group, members in self.listed:
                if group.extra and any(_is_sparse(m.param.grad) for m in members):
                    return None
        try:
            buffers = [group.gather_() for group in self.packed]
        except (TypeError, RuntimeError):
            if any(p.grad is None or _is_sparse(p.grad) for group in self.packed for p in group.params):
                return None
            raise
        found = [buffer for buffer in buffers if buffer is not None]
        return found if len(found) == len(buffers) else None

    def write_gradients(self) -> None:
        """Copies the packed groups' gradients back to `.grad`, where `pyro.optim` leaves them clipped."""
        for group in self.packed:
            group.write_gradients()


class FlatPlan(Plan):
    """The plan of a call that hands over its gradients."""

    def __init__(
        self,
        dense: Sequence[FlatGradients],
        loose: Sequence[tuple[str, Tensor, Tensor]],
        members: Sequence[Member],
    ) -> None:
        tensors = tuple(p for flat in dense for p in flat.params) + tuple(p for _, p, _ in loose)
        super().__init__(tensors, members, ())
        self._all_places = places(tensors)
        self._keys = [flat.params for flat in dense]
        self._loose = [p for _, p, _ in loose]
        self._loose_index = {id(p): i for i, p in enumerate(self._loose)}
        self._where = {
            id(p): (i, start, start + p.numel())
            for i, flat in enumerate(dense)
            for p, start in zip(flat.params, flat.offsets()[:-1], strict=True)
        }
        self._runs = [self._run(group) for group in self.packed]

    def is_for(self, dense: Sequence[FlatGradients], loose: Sequence[tuple[str, Tensor, Tensor]]) -> bool:
        """Returns whether this is still the plan for these gradients."""
        return (
            len(dense) == len(self._keys)
            and all(flat.params is key for flat, key in zip(dense, self._keys, strict=True))
            and len(loose) == len(self._loose)
            and all(p is q for (_, p, _), q in zip(loose, self._loose, strict=True))
            and places(self.tensors) == self._all_places
        )

    def scattered(self, dense: Sequence[FlatGradients], loose: Sequence[tuple[str, Tensor, Tensor]]) -> list[Tensor]:
        """Finds the gradients of each group in the given buffers; copies only where they do not lie side by side."""
        buffers = []
        for group, run in zip(self.packed, self._runs, strict=True):
            if run is not None:
                i, start, end = run
                buffers.append(dense[i].buffer[start:end])
            else:
                group.gather_([self._one(p, dense, loose) for p in group.params])
                buffers.append(group.buffer)
        for _, members in self.listed:
            for m in members:
                m.param.grad = self._one(m.param, dense, loose)
        return buffers

    def write_gradients(self) -> None:
        """Does nothing: the gradients that were handed over are not those in `.grad`."""

    def _one(self, p: Tensor, dense: Sequence[FlatGradients], loose: Sequence[tuple[str, Tensor, Tensor]]) -> Tensor:
        if id(p) in self._loose_index:
            return loose[self._loose_index[id(p)]][2]
        i, start, end = self._where[id(p)]
        return dense[i].buffer[start:end].view(p.shape)

    def _run(self, group: PackedGroup) -> tuple[int, int, int] | None:
        """Where all of a group's gradients lie side by side and in its order, if they do."""
        found = [self._where.get(id(p)) for p in group.params]
        runs: list[tuple[int, int, int]] = [f for f in found if f is not None]
        if len(runs) != len(found) or any(a[0] != b[0] or a[2] != b[1] for a, b in zip(runs, runs[1:], strict=False)):
            return None
        return runs[0][0], runs[0][1], runs[-1][2]


def _is_sparse(gradient: Any) -> bool:
    return gradient is not None and gradient.layout is not torch.strided


# The guard against gradients that are NaN or infinite.


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

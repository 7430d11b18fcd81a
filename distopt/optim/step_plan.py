"""What one call of the optimizer does, worked out once and used for as long as the calls are equal.

A training loop calls with the same parameters thousands of times. Sorting them by name, finding their groups and what
they clip takes longer than the step; comparing two tuples by identity takes microseconds. So a call is compared with
the plans of the last few calls first, and planned only when it fits none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import accumulate, chain, count
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from distopt.optim.capabilities import acts_without_gradient
from distopt.optim.clipping import Clip, Gradients, clip_by_global_norm_
from distopt.optim.grouping import Grouping
from distopt.optim.groups import ListGroup, PackedGroup, ParamRecord
from distopt.optim.joining import STEADY_CALLS
from distopt.optim.packing import FlatGradients, addresses, has_dense_gradients, same
from distopt.optim.parameters import ParamRegistry
from distopt.optim.state import State

LooseGradients: TypeAlias = Sequence[tuple[str, Tensor, Tensor]]
"""(name, parameter, gradient) of gradients that are not packed."""

MAX_SELECTED_NUMEL = 128
"""Elements of a parameter, on average, up to which an index of all of them is quicker than a view of each parameter."""

_MAX_PLANS = 4  # calls of alternating kinds (wake and sleep, model and guide) that are remembered


class StepPlan:
    """The groups that a call with certain parameters steps.

    Args:
        tensors: The parameters as they were handed over.
        members: Those of them that have a gradient.
        missing: Those that have none.
        idle: Those without one whose optimizer is called all the same, as `pyro.optim` does: its rate may decay.

    Attributes:
        whole: The groups of which it steps all members.
        num_uses: How many calls have used it.
    """

    _leaves_gradients: ClassVar[bool] = True  # as they are stepped by, in `.grad`

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        members: Sequence[ParamRecord],
        missing: Sequence[Tensor] = (),
        idle: Sequence[ParamRecord] = (),
    ) -> None:
        self.tensors = tensors
        self._missing = list(missing)
        self._idle = list(idle)

        # Packed groups are stepped whole: `Grouping.arrange` has seen to it that all of their members are among these.
        by_group: dict[int, list[ParamRecord]] = defaultdict(list)
        for m in members:
            by_group[id(m.group)].append(m)
        groups = {i: mates[0].group for i, mates in by_group.items()}
        self._packed = [g for g in groups.values() if isinstance(g, PackedGroup)]
        self._listed = [(g, by_group[i]) for i, g in groups.items() if isinstance(g, ListGroup)]
        self.whole: list[PackedGroup | ListGroup] = [*self._packed]
        self.whole += [g for g, members in self._listed if len(members) == len(g.members)]
        self.num_uses = 0
        self._listed_params = tuple(m.param for _, members in self._listed for m in members)
        self._listed_params += tuple(m.param for m in self._idle)
        self._listed_at = addresses(self._listed_params)

        # Only what some parameter asks for is looked at in a step.
        clips = {id(m.clip): m.clip for m in members}.values()
        self._clips_each = any(c.per_parameter for c in clips)
        self._norms = _global_norms(clips)

    def fits(self, tensors: tuple[Tensor, ...]) -> bool:
        """Returns whether this is still the plan for `tensors`: the same ones, where they were, with gradients.

        Packed parameters are not looked at here: `gather` finds those that were moved or have no gradient.
        """
        return (
            same(tensors, self.tensors)
            and all(p.grad is None for p in self._missing)
            and addresses(self._listed_params) == self._listed_at
        )

    def gather(self) -> list[Tensor] | None:
        """Copies the `.grad` of the packed groups' parameters side by side.

        Returns:
            One buffer per packed group; None when some gradient is missing or sparse, or a parameter was moved, so that
            a new plan is needed.
        """
        if not has_dense_gradients(self._listed_params):
            for group, members in self._listed:
                if group.switches and any(_is_sparse(m.param.grad) for m in members):
                    return None

        # Tried first and explained afterwards: to look for a missing gradient before each step would take as long as
        # the copy.
        try:
            buffers = [group.gather_() for group in self._packed]
        except (TypeError, RuntimeError):
            if any(p.grad is None or _is_sparse(p.grad) for group in self._packed for p in group.params):
                return None
            raise
        whole = [buffer for buffer in buffers if buffer is not None]
        return whole if len(whole) == len(buffers) else None

    def gradients(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Returns all gradients, those of packed groups as one each."""
        listed = [m.param.grad for _, members in self._listed for m in members]
        return [*buffers, *(gradient for gradient in listed if gradient is not None)]

    def _clipped_by(self, global_norm: float, buffers: Sequence[Tensor]) -> list[Gradients]:
        """Returns the gradients whose common norm has this limit."""
        packed = [(g, b) for g, b in zip(self._packed, buffers, strict=True) if g.clip.global_norm == global_norm]
        listed = [m for _, members in self._listed for m in members if m.clip.global_norm == global_norm]
        return [Gradients(buffer, group.numels) for group, buffer in packed] + [
            Gradients(m.param.grad) for m in listed if m.param.grad is not None
        ]

    def clip_and_step(
        self, buffers: Sequence[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], total_norm: float | None
    ) -> None:
        """Clips the gradients, in place, and steps.

        Each parameter's own limits come first and the global norms second, so that these are norms of what is stepped
        by. Parameters may have different global norms; each is over the parameters that have it.
        """
        changed = False
        if self._clips_each:
            for group, buffer in zip(self._packed, buffers, strict=True):
                changed |= group.clip_(buffer)
            for listed, members in self._listed:
                listed.clip_(members)
        for norm in self._norms:
            changed |= clip_by_global_norm_(self._clipped_by(norm, buffers), norm, total_norm)
        if self._leaves_gradients:
            for group, buffer in zip(self._packed, buffers, strict=True):
                changed |= group.clamp_(buffer)
            if changed:
                self._write_gradients()

        for group, buffer in zip(self._packed, buffers, strict=True):
            group.step(buffer, *args, **kwargs)
        for listed, members in self._listed:
            listed.step(members, *args, **kwargs)
        for m in self._idle:
            _step_without_gradient(m, *args, **kwargs)

    def _write_gradients(self) -> None:
        """Copies the packed groups' gradients back to `.grad`, where `pyro.optim` leaves them clipped."""
        for group in self._packed:
            group.write_gradients()

    def nonfinite_names(self, buffers: Iterable[Tensor]) -> tuple[str, ...]:
        """Returns the names of the parameters whose gradient is not finite, sorted."""
        names: list[str] = []
        for group, buffer in zip(self._packed, buffers, strict=True):
            segments = torch.split(buffer, group.numels)
            names += [name for name, s in zip(group.names, segments, strict=True) if not all_finite([s])]
        for _, members in self._listed:
            names += [m.name for m in members if m.param.grad is not None and not all_finite([m.param.grad])]
        return tuple(sorted(names))


class _Source(NamedTuple):
    """The parameters whose gradients one buffer holds, in its order, and where.

    Attributes:
        params: As they were handed over.
        positions: Position of each, by id.
        numels: Elements of each.
        offsets: Where each gradient starts, and at last where the last one ends.
    """

    params: tuple[Tensor, ...]
    positions: dict[int, int]
    numels: list[int]
    offsets: list[int]

    def extended(self, params: tuple[Tensor, ...]) -> _Source:
        """Returns the source of `params`, the first of which are its own; of these pointers are copied."""
        first = len(self.params)
        new = params[first:]
        numels = list(map(Tensor.numel, new))
        return _Source(
            params,
            self.positions | dict(zip(map(id, new), count(first), strict=False)),
            [*self.numels, *numels],
            [*self.offsets[:-1], *accumulate(numels, initial=self.offsets[-1])],
        )


_Location: TypeAlias = tuple[tuple[int, int, int] | None, Tensor | None]
"""Where a group's gradients are: which buffer, and from where to where, if they lie there side by side and in the
group's order; else the index of each element in the only buffer, if there is one and elements are few."""


class FlatStepPlan(StepPlan):
    """The plan of a call that hands over its gradients.

    Where a group's gradients lie side by side in one of the given buffers, and in the group's order, that slice is
    what the group steps by, without a copy. So they do in the steady state of a distributed run, whose buckets and
    whose groups are both sorted by name.
    """

    _leaves_gradients: ClassVar[bool] = False  # those that were handed over are not those in `.grad`

    def __init__(
        self,
        dense: Sequence[FlatGradients],
        loose: LooseGradients,
        missing: Sequence[Tensor],
        members: Sequence[ParamRecord],
        idle: Sequence[ParamRecord],
    ) -> None:
        # An element's last bit may follow from whether it is in the rest of a vector register, so from its position in
        # the flat tensor: the order is that of the names, whatever order the gradients come in.
        tensors = tensors_of(dense, loose) + tuple(missing)
        super().__init__(tensors, sorted(members, key=attrgetter("name")), missing, idle)
        self._loose = [p for _, p, _ in loose]
        self._loose_index = {id(p): i for i, p in enumerate(self._loose)}
        self._all_at = addresses(self.tensors)
        self._sources: list[_Source] = []
        self._locations: dict[PackedGroup, _Location] = {}
        self._use(dense)

    def _use(self, dense: Sequence[FlatGradients]) -> None:
        """Notes where each gradient is; of the sources that were noted before only what is new behind the others."""
        new = [_Source((), {}, [], [0])] * (len(dense) - len(self._sources))
        self._sources = [
            source.extended(flat.params) for source, flat in zip([*self._sources, *new], dense, strict=True)
        ]
        self._locations = {group: self._locations.get(group) or self._locate(group) for group in self._packed}
        indices = [index for span, index in self._locations.values() if span is None]
        self._is_scattered = bool(indices)
        self._selection: Tensor | None = None
        if len(dense) == 1 and all(index is not None for index in indices) and indices:
            self._selection = torch.cat(indices).to(dense[0].buffer.device)  # type: ignore[arg-type]  # none is None

    def _locate(self, group: PackedGroup) -> _Location:
        """Returns where a group's gradients are."""
        for i, source in enumerate(self._sources):
            first = source.positions.get(id(group.params[0]))
            if first is not None:
                after = first + len(group.params)
                if same(source.params[first:after], group.params):
                    return (i, source.offsets[first], source.offsets[after]), None
        return None, self._index_of(group) if len(self._sources) == 1 else None

    def _index_of(self, group: PackedGroup) -> Tensor | None:
        """Returns the index in the only buffer of each element of a group; None if they are many."""
        source = self._sources[0]
        positions = list(map(source.positions.get, map(id, group.params)))
        if None in positions or sum(group.numels) > MAX_SELECTED_NUMEL * len(positions):
            return None
        starts = torch.tensor(list(map(source.offsets.__getitem__, positions)))  # type: ignore[arg-type]
        lengths = torch.tensor(group.numels)
        shifts = starts - (lengths.cumsum(0) - lengths)
        return shifts.repeat_interleave(lengths).add_(torch.arange(sum(group.numels)))

    def is_extended_by(self, dense: Sequence[FlatGradients]) -> bool:
        """Returns whether these gradients are its own, of parameters where they were, and new ones behind them."""
        return (
            not (self._loose or self._listed or self._missing)
            and len(dense) >= len(self._sources)
            and all(
                same(flat.params[: len(source.params)], source.params)
                for flat, source in zip(dense, self._sources, strict=False)
            )
            and self._is_in_place()
        )

    def new_in(self, dense: Sequence[FlatGradients]) -> dict[str, Tensor]:
        """Returns by name the parameters of `dense`, by which it is extended, that it lacks."""
        known = [len(source.params) for source in self._sources] + [0] * (len(dense) - len(self._sources))
        new: dict[str, Tensor] = {}
        for flat, first in zip(dense, known, strict=True):
            new.update(zip(flat.names[first:], flat.params[first:], strict=True))
        return new

    def extended(self, dense: Sequence[FlatGradients], groups: Iterable[PackedGroup]) -> FlatStepPlan:
        """Returns the plan of a call that steps new parameters besides those of this plan, all of them in `groups`.

        To sort all parameters into their groups takes ten times as long as a step, and a model that grows would do it
        in each step.
        """
        plan = copy(self)
        plan.tensors = tensors_of(dense)
        plan._all_at = addresses(plan.tensors)
        plan._packed = sorted(groups, key=lambda group: group.names[0])  # as if they were all new
        plan.whole = [*plan._packed]
        plan.num_uses = 0
        plan._clips_each = any(group.clip.per_parameter for group in plan._packed)
        plan._norms = _global_norms(group.clip for group in plan._packed)
        plan._use(dense)
        return plan

    def is_for(self, dense: Sequence[FlatGradients], loose: LooseGradients, missing: Sequence[Tensor]) -> bool:
        """Returns whether this is still the plan for these gradients, and these parameters without one."""
        return (
            len(dense) == len(self._sources)
            and all(flat.params is source.params for flat, source in zip(dense, self._sources, strict=True))
            and len(loose) == len(self._loose)
            and all(p is q for (_, p, _), q in zip(loose, self._loose, strict=True))
            and same(tuple(missing), tuple(self._missing))
            and self._is_in_place()
        )

    def _is_in_place(self) -> bool:
        return bool(addresses(self.tensors) == self._all_at)

    def scatter(self, dense: Sequence[FlatGradients], loose: LooseGradients) -> list[Tensor]:
        """Returns the gradients of each packed group, and gives those of listed parameters to their `.grad`."""
        buffers = []
        pieces: dict[int, Tensor] = {}
        selected: Iterator[Tensor] = iter(())
        if self._selection is not None:
            sizes = [len(group.arena.flat) for group in self._packed if self._locations[group][0] is None]
            selected = iter(torch.split(dense[0].buffer.index_select(0, self._selection), sizes))
        elif self._is_scattered:  # one call cuts all of a buffer; a view of each takes three times as long
            for flat, source in zip(dense, self._sources, strict=True):
                numels = source.numels
                pieces.update(zip(map(id, flat.params), torch.split_with_sizes(flat.buffer, numels), strict=True))
            pieces.update((id(p), gradient.reshape(-1)) for _, p, gradient in loose if not _is_sparse(gradient))

        for group in self._packed:
            span, _ = self._locations[group]
            if span is not None:
                i, start, end = span
                buffer = dense[i].buffer
                buffers.append(buffer if end - start == buffer.numel() else buffer[start:end])
            elif self._selection is not None:
                buffers.append(next(selected))
            else:
                buffers.append(group.join_(list(map(pieces.__getitem__, map(id, group.params)))))
        for _, members in self._listed:
            for m in members:
                m.param.grad = self._gradient(m.param, dense, loose)
        return buffers

    def _gradient(self, p: Tensor, dense: Sequence[FlatGradients], loose: LooseGradients) -> Tensor:
        if id(p) in self._loose_index:
            return loose[self._loose_index[id(p)]][2]
        i, source = next((i, each) for i, each in enumerate(self._sources) if id(p) in each.positions)
        start = source.offsets[source.positions[id(p)]]
        return dense[i].buffer[start : start + p.numel()].view(p.shape)


class Planner:
    """Finds the plan of a call: which parameters it is about, and which groups step them.

    Args:
        registry: The parameters that the optimizer has seen.
        groups: Where each of them is stepped.
        record: Makes the record of a parameter that is seen for the first time.
    """

    def __init__(self, registry: ParamRegistry, groups: Grouping, record: Callable[[str, Tensor], ParamRecord]) -> None:
        self._registry = registry
        self._groups = groups
        self._new_record = record
        self._plans: list[StepPlan] = []
        self._flat_plans: list[FlatStepPlan] = []

    def plan_for(self, tensors: tuple[Tensor, ...]) -> tuple[StepPlan, list[Tensor]]:
        """Returns the plan for a call with `tensors`, and the gradients of its packed groups."""
        for i, plan in enumerate(self._plans):
            if plan.fits(tensors):
                buffers = plan.gather()
                if buffers is not None:
                    if self._joins(plan):
                        return self.plan_for(tensors)
                    if i:
                        self._plans.insert(0, self._plans.pop(i))
                    return plan, buffers

        # The order by name makes groups, and so sums over them, the same on all ranks: Pyro hands over a set.
        members = self._registry.known(tensors)
        if members is None:
            members = self._records(self._registry.named(tensors))

        missing = []
        if not has_dense_gradients(tensors):
            for m in members:
                if _is_sparse(m.param.grad):
                    self._set_alone(m)
            missing = [m for m in members if m.param.grad is None]
        self._arrange(members, missing)

        absent = set(map(id, missing))
        stepped = [m for m in members if id(m) not in absent]
        idle = [m for m in missing if acts_without_gradient(self._groups.constructor, m.args)]
        plan = StepPlan(tensors, stepped, [m.param for m in missing], idle)
        buffers = plan.gather()
        if buffers is None:
            raise RuntimeError("distopt.optim: gradients changed while the step was being planned.")
        self._plans = [plan, *self._plans[: _MAX_PLANS - 1]]
        self._joins(plan)
        return plan, buffers

    def flat_plan_for(
        self,
        dense: Sequence[FlatGradients],
        loose: LooseGradients,
        missing: Sequence[tuple[str, Tensor]] = (),
    ) -> FlatStepPlan:
        """Returns the plan for a call that hands over gradients, and names parameters that have none."""
        without = [p for _, p in missing]
        for plan in self._flat_plans:
            if plan.is_for(dense, loose, without):
                return self.flat_plan_for(dense, loose, missing) if self._joins(plan) else plan

        extended = self._extended_plan(dense) if self._flat_plans and not (loose or missing) else None
        if extended is not None:
            plan = extended
        else:
            named = [pair for flat in dense for pair in zip(flat.names, flat.params, strict=True)]
            records = self._records([*named, *((name, p) for name, p, _ in loose), *missing])
            members, idle = records[: len(records) - len(missing)], records[len(records) - len(missing) :]
            for m, (_, _, gradient) in zip(members[len(named) :], loose, strict=True):
                if _is_sparse(gradient):
                    self._set_alone(m)
            self._arrange([*sorted(members, key=attrgetter("name")), *idle], idle)
            idle = [m for m in idle if acts_without_gradient(self._groups.constructor, m.args)]
            plan = FlatStepPlan(dense, loose, without, members, idle)
        self._flat_plans = [plan, *self._flat_plans[: _MAX_PLANS - 1]]
        self._joins(plan)
        return plan

    def _extended_plan(self, dense: Sequence[FlatGradients]) -> FlatStepPlan | None:
        """Returns the plan of a call that differs from the last one by new parameters; None where all are sorted out.

        So it is in a model that grows, and what a step costs besides follows from what is new.
        """
        last = self._flat_plans[0]
        if len(last.tensors) < len(self._registry) or not last.is_extended_by(dense):
            return None  # or some were in no call for long and may be gone
        new = last.new_in(dense)
        if not new or any(self._registry.get_all(new.values())):
            return None

        records = [self._new_record(name, new[name]) for name in sorted(new)]
        for record in records:
            self._registry.add(record)
        self._groups.assign([(m, self._claim(m)) for m in records])
        self.forget()

        # The call has all parameters, so it steps all groups, those too that were joined now.
        packed = [group for group in self._groups if isinstance(group, PackedGroup)]
        is_packed = sum(len(group.members) for group in packed) == len(self._registry)
        return last.extended(dense, packed) if is_packed else None

    def _joins(self, plan: StepPlan) -> bool:
        """Counts a use of a plan; returns whether its groups were joined, so that another plan is needed."""
        plan.num_uses += 1
        if plan.num_uses % STEADY_CALLS == 0 and self._groups.join_steady(plan.whole):
            self.forget()
            return True
        self._groups.note_call(plan.whole)
        return False

    def settle(self) -> None:
        """Makes what was set for single parameters hold, before anything depends on it."""
        if self._groups.settle():
            self.forget()

    def remove(self, records: Sequence[ParamRecord]) -> None:
        """Removes parameters with their states; they begin anew when they are stepped again."""
        self.settle()
        self._groups.extract(records)
        for record in records:
            self._registry.forget(record)
        self.forget()

    def read_clips(self, records: Sequence[ParamRecord], clip_of: Callable[[str], Clip]) -> None:
        """Asks anew how the gradients of parameters are clipped."""
        self.settle()
        extracted = self._groups.extract(records)
        for m, _ in extracted:
            m.clip = clip_of(m.name)
            m.key = (m.key[0], m.clip, *m.key[2:])
        self._groups.assign(extracted)
        self.forget()

    def forget(self) -> None:
        """Drops all plans: parameters have changed their groups."""
        self._plans.clear()
        self._flat_plans.clear()

    def _records(self, named: Iterable[tuple[str, Tensor]]) -> list[ParamRecord]:
        """Returns the record of each parameter, new where it was never seen; lets go of those that left the store."""
        named = list(named)
        records = []
        for (name, p), record in zip(named, self._registry.get_all(p for _, p in named), strict=True):
            if record is None:
                record = self._new_record(name, p)
                self._registry.add(record)
            records.append(record)

        for record in self._registry.gone(records):
            [(_, state)] = self._groups.extract([record])
            self._registry.remove(record, state)
            self.forget()
        return records

    def _arrange(self, members: Sequence[ParamRecord], missing: Sequence[ParamRecord]) -> None:
        if self._groups.arrange(members, missing, self._claim):
            self.forget()

    def _set_alone(self, record: ParamRecord) -> None:
        if self._groups.set_alone(record):
            self.forget()

    def _claim(self, record: ParamRecord) -> State | None:
        """Returns the state that waits for a parameter now seen first, or with which it once left."""
        state = self._registry.waiting.get(record.name)
        if state is None:
            return self._registry.returned(record.param)
        self._groups.check(record, state)
        return self._registry.waiting.pop(record.name)


def tensors_of(dense: Sequence[FlatGradients], loose: LooseGradients = ()) -> tuple[Tensor, ...]:
    """Returns the parameters of a call, in the order in which it hands over their gradients."""
    return (*chain.from_iterable(flat.params for flat in dense), *(p for _, p, _ in loose))


def _global_norms(clips: Iterable[Clip]) -> list[float]:
    return sorted({clip.global_norm for clip in clips if clip.global_norm is not None})


def _is_sparse(gradient: Any) -> bool:
    return gradient is not None and gradient.layout is not torch.strided


def _step_without_gradient(m: ParamRecord, *args: Any, **kwargs: Any) -> None:
    """Calls the optimizer of a parameter that no rank has a gradient of; this rank may have one of an earlier call."""
    assert isinstance(m.group, ListGroup)
    gradient = m.param.grad
    m.param.grad = None
    try:
        m.group.step([m], *args, **kwargs)
    finally:
        m.param.grad = gradient


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether every element of all `tensors` is finite; one transfer from the device."""
    finite = [torch.isfinite(t.coalesce()._values() if t.is_sparse else t).all() for t in tensors]
    return not finite or bool(torch.stack([f.to(finite[0].device) for f in finite]).all())

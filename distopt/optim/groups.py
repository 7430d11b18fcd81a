"""Groups of parameters that are stepped together by one torch optimizer.

There are two kinds. A `PackedGroup` shows its optimizer a single flat tensor and costs one call however many parameters
it has; its members must be equal in everything but their elements. A `ListGroup` hands its optimizer a list of tensors,
each with a separate state and step count, and costs what torch's `foreach` or fused loops cost.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from distopt.optim.capabilities import drifts
from distopt.optim.clipped_adam import ClippedAdam
from distopt.optim.clipping import Clip, clip_each_, clip_segments_
from distopt.optim.packed_state import PackedState, Row, StateColumns, exact_key, pack_rows
from distopt.optim.packing import Arena, GradientBuffer, bump_versions, has_dense_gradients
from distopt.optim.staggered import Stagger, staggered_step
from distopt.optim.state import (
    SCALARS,
    State,
    copied,
    flat_state,
    is_scheduler,
    list_state,
    load_into,
    optimizer_of,
    optimizer_state,
    packing_key,
    state_dict_of,
    state_of_one,
)

_shape = attrgetter("shape")


@dataclass(slots=True, eq=False)
class ParamRecord:
    """One parameter that the optimizer has seen.

    Attributes:
        param: The user's own tensor.
        name: Its name in the parameter store, kept when the store forgets it.
        args: Arguments of its torch optimizer.
        clip: How its gradient is clipped.
        key: What parameters must have in common to share a group: arguments, clip, dtype, device, and when they were
            first seen where that matters (a schedule starts then).
        alone: Whether it needs a torch optimizer for it alone, without any switch that makes it quick.
        named: Whether the parameter store has known it.
        group: Where it is stepped; None before its first step.
    """

    param: Tensor
    name: str
    args: dict[str, Any]
    clip: Clip
    key: tuple[Any, ...]
    alone: bool
    named: bool
    group: Group | None = field(default=None, repr=False)


Construct = Callable[[list[Any], dict[str, Any]], Any]
"""Builds an optimizer, or a scheduler of one, from torch parameters (or parameter groups) and arguments."""


class Group(Protocol):
    """Parameters behind one torch optimizer or scheduler, the `handle`.

    Attributes:
        last_call: The last call of the optimizer that has stepped all of its members.
        num_in_row: How many calls in a row have done so until then.
    """

    handle: Any
    members: list[ParamRecord]
    switches: dict[str, Any]
    last_call: int
    num_in_row: int

    @property
    def shares_hyper(self) -> bool:
        """Whether all members have the same hyper-parameters, in the one parameter group of torch's optimizer."""

    def states(self) -> list[State]:
        """Returns the states of all members, in their order; they share no memory with it."""

    def packed(self) -> PackedState:
        """Returns the states of all members in columns; tensors may be the optimizer's memory."""

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the members."""

    def has_lost(self, member: ParamRecord) -> bool:
        """Returns whether `member` was moved since it came here: to other storage, dtype or device."""

    def is_whole(self) -> bool:
        """Returns whether all members are known not to have been moved."""

    def values_of(self, member: ParamRecord) -> dict[str, Any]:
        """Returns what torch keeps for one member; tensors are the optimizer's memory."""

    def hyper_of(self, member: ParamRecord) -> dict[str, Any]:
        """Returns torch's parameter group that `member` is in, perhaps with others."""


# What both kinds do with their torch optimizer.


def load_state(handle: Any, state: State, switches: dict[str, Any]) -> None:
    """Loads `state` into a new `handle` and sets the fast path's switches anew.

    Torch's `load_state_dict` suits a state to the optimizer in ways that must be undone here: it casts every tensor to
    the parameter's dtype, which rounds numbers such as `mu_product` in 16 bits, and keeps the order of memory in which
    a tensor was saved, though the kernels that take one pass go through parameter and state as one.
    """
    optimizer_dict = optimizer_state(state)
    for group in optimizer_dict["param_groups"]:
        group.update(switches)
    load_into(handle, state)

    optimizer = optimizer_of(handle)
    if optimizer_dict["state"]:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # no warning of a scheduler stepped first
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, saved in optimizer_dict["state"].items():
        if not isinstance(i, int):
            continue  # an optimizer of the user's may keep state that belongs to no parameter
        values = optimizer.state[params[i]]
        for key in SCALARS & saved.keys() - {"step"}:
            values[key] = saved[key]
        for key, value in values.items():
            if isinstance(value, Tensor) and value.stride() != params[i].stride() and value.layout is torch.strided:
                values[key] = _laid_out_as(value, params[i])


def _laid_out_as(value: Tensor, param: Tensor) -> Tensor:
    """Returns state of the shape of `param` in the order of its memory; other state as it is."""
    return torch.empty_like(param).copy_(value) if value.shape == param.shape else value


def user_options(group: dict[str, Any], args: dict[str, Any], switches: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a torch parameter group as the user's own optimizer would have them.

    Switches that were added to make the optimizer quick must not be saved: `pyro.optim`, or another device, would load
    them.
    """
    options = {k: copied(v) for k, v in group.items() if k != "params"}
    for key in switches:
        if key in options:
            options[key] = args.get(key)
    return options


def with_schedule(handle: Any, optimizer: State) -> State:
    """Returns one parameter's state: its optimizer's, and a copy of the schedule where there is one."""
    return {"scheduler": copied(handle.state_dict()), "optimizer": optimizer} if is_scheduler(handle) else optimizer


def _rates_of(handle: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer_of(handle).param_groups if "lr" in group]


def direct_step(handle: Any) -> Callable[..., Any]:
    """Returns the optimizer's step without what torch wraps around it for profiling, compiling and schedules.

    The wrappers take longer than a step of small parameters, and the first import torch's compiler.
    """
    optimizer = optimizer_of(handle)
    return partial(inspect.unwrap(type(optimizer).step), optimizer)


def _unwritable(value: Any) -> Any:
    # torch itself refuses to write into a tensor of inference mode; `copied` makes a plain one of it again.
    with torch.inference_mode():
        return copied(value)


class PackedGroup:
    """Parameters equal in all but their elements, packed into one flat tensor, the only one that torch sees.

    Args:
        members: With packable parameters, of one dtype and device.
        construct: See `Construct`.
        switches: Further arguments of the optimizer that make it quick without changing what it computes.
        states: One per member, equal in all that is not elementwise but for step counts and rates that decay with
            them, where the optimizer can be staggered; None for parameters not stepped yet.

    Attributes:
        arena: The members' memory.
        params: The members' tensors.
        names: The members' names.
        clip: How each member's gradient is clipped.
        switches: As given.
    """

    def __init__(
        self,
        members: Sequence[ParamRecord],
        construct: Construct,
        switches: dict[str, Any],
        states: Sequence[State] | None,
    ) -> None:
        self.members = list(members)
        self.params = tuple(m.param for m in members)
        self.names = tuple(m.name for m in members)
        self.clip = members[0].clip
        self.switches = switches
        self._index = {id(m): i for i, m in enumerate(self.members)}
        self.arena = Arena(self.params)

        self.handle = construct([self.arena.flat], members[0].args | switches)
        self._stagger: Stagger | None = None
        if states is not None:
            load_state(self.handle, flat_state(states), switches)
            self._stagger = Stagger.of(states, self.numels)
        self._step = direct_step(self.handle)
        if self._stagger is not None:
            staggered = staggered_step(optimizer_of(self.handle), self.arena.flat, self._stagger)
            self._step = self._step if staggered is None else staggered
        self._gradients = GradientBuffer(self.arena)
        self.last_call = 0
        self.num_in_row = 0
        for m in self.members:
            m.group = self

    @property
    def numels(self) -> list[int]:
        """Number of elements of each parameter."""
        return self.arena.numels

    def has_lost(self, member: ParamRecord) -> bool:
        """Returns whether `member` was moved since it was packed here: to other storage, dtype or device."""
        return not self.arena.holds(self._index[id(member)])

    def is_whole(self) -> bool:
        """Returns whether no member was moved; that of all of them takes less time than `has_lost` of each."""
        return self.arena.is_whole()

    def gather_(self) -> Tensor | None:
        """Copies the members' gradients side by side; see `GradientBuffer.gather_`."""
        return self._gradients.gather_()

    def join_(self, gradients: Sequence[Tensor]) -> Tensor:
        """Copies gradients, one 1-D tensor for each member, side by side."""
        return torch.cat(list(gradients), out=self._gradients.flat)

    def clip_(self, buffer: Tensor) -> bool:
        """Clips the gradient of each member by itself, in place; returns whether one changed."""
        return self.clip.per_parameter and clip_segments_(buffer, self.numels, self.clip)

    def clamp_(self, buffer: Tensor) -> bool:
        """Clamps the gradients as `ClippedAdam` will in its step, in place; returns whether one may have changed.

        Pyro's leaves the clamped gradient to the user, so it is known here before the step.
        """
        optimizer = optimizer_of(self.handle)
        if not isinstance(optimizer, ClippedAdam):
            return False
        bound = optimizer.param_groups[0]["clip_norm"]
        if buffer.device.type == "cpu":  # elsewhere the answer would have to be waited for
            low, high = torch.aminmax(buffer)
            if max(-low.item(), high.item()) <= bound:
                return False
        buffer.clamp_(-bound, bound)
        return True

    def write_gradients(self) -> None:
        """Copies what `gather_` has gathered, and clipping has changed since, back to each member's `.grad`."""
        self._gradients.write_back()

    def step(self, buffer: Tensor, *args: Any, **kwargs: Any) -> None:
        """Steps all members by the gradients in `buffer`, which may be overwritten."""
        self.arena.flat.grad = buffer
        self._step(*args, **kwargs)
        bump_versions(self.params)

    def values_of(self, member: ParamRecord) -> dict[str, Any]:
        """Returns what torch keeps for one member.

        Elementwise tensors are views of the optimizer's memory. What all members share, such as the step, is a copy
        that refuses to be changed in place: the change would be lost.
        """
        flat = self.arena.flat
        index = self._index[id(member)]
        start = sum(self.numels[:index])
        segment = slice(start, start + self.numels[index])
        values = optimizer_of(self.handle).state.get(flat, {})
        of_member = {
            key: value[segment].view(member.param.shape)
            if isinstance(value, Tensor) and value.shape == flat.shape
            else _unwritable(value)
            for key, value in values.items()
        }
        return of_member if self._stagger is None else of_member | self._stagger.values_of(index, of_member)

    def hyper_of(self, member: ParamRecord) -> dict[str, Any]:
        """Returns torch's parameter group, in which `params` is the flat tensor of all members.

        Where members have separate rates, it is a copy.
        """
        hyper = optimizer_of(self.handle).param_groups[0]
        return hyper if self._stagger is None else self._stagger.hyper_of(self._index[id(member)], hyper)

    def key(self, *, staggered: bool) -> Any:
        """Returns what must be equal for two packed groups to be joined, see `packing_key`; None for never."""
        columns = self._columns()
        key = packing_key(columns.shared, 0, staggered=staggered)
        return key and (key, tuple((name, column.dtype) for name, column in columns.columns.items()))

    @property
    def shares_hyper(self) -> bool:
        """Whether all members have the same hyper-parameters, in the one parameter group of torch's optimizer."""
        return self._stagger is None or self._stagger.rates is None

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the members."""
        rates = None if self._stagger is None else self._stagger.rates
        return _rates_of(self.handle) if rates is None else rates.tolist()

    def packed(self) -> PackedState:
        """Returns the state of all members; its columns are the optimizer's memory where it is one for all."""
        if self._stagger is None:
            return PackedState((self._columns(),))
        return PackedState.from_states(dict(zip(self.names, self.states(), strict=True)))

    def states(self) -> list[State]:
        """Returns the states of all members, in their order: views of one copy for each kind of state.

        A copy for each member would take ten times as long, and as long again to save.
        """
        live = self._columns()
        states = replace(live, columns={key: column.clone() for key, column in live.columns.items()}).states()
        if self._stagger is None:
            return states
        return [self._stagger.state_of(index, state) for index, state in enumerate(states)]

    def _columns(self) -> StateColumns:
        """Returns the state of all members, in their order, in the optimizer's memory."""
        optimizer = optimizer_of(self.handle)
        flat = self.arena.flat
        values = optimizer.state.get(flat, {})
        columns = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.shape == flat.shape}
        scalars = {k: copied(v) for k, v in values.items() if k not in columns}

        options = user_options(optimizer.param_groups[0], self.members[0].args, self.switches)
        shared = with_schedule(self.handle, state_of_one(options, scalars))
        shapes: tuple[Any, ...] = tuple(map(_shape, self.params)) if columns else ((),) * len(self.params)
        return StateColumns(self.names, shapes, shared, columns)


class ListGroup:
    """Parameters of equal hyper-parameters and any number of steps: torch's list of tensors, a state for each.

    Where the optimizer changes its hyper-parameters as it steps, each parameter has a separate torch parameter group.

    Args:
        members: Parameters of one dtype and device, or a single one of any kind.
        construct: See `Construct`.
        switches: Further arguments of the optimizer that make it quick without changing what it computes.
        states: One per member, of equal hyper-parameters; None for parameters not stepped yet.

    Attributes:
        alone: Whether it has one parameter, whose torch optimizer is built as the user would build it.
        is_final: Whether it was tried to pack its members, and they are listed because they cannot be.
        switches: As given.
    """

    def __init__(
        self,
        members: Sequence[ParamRecord],
        construct: Construct,
        switches: dict[str, Any],
        states: Sequence[State] | None,
    ) -> None:
        self.members = list(members)
        self.switches = switches
        self.alone = members[0].alone
        self.is_final = self.alone
        separate = not self.alone and drifts(members[0].args)
        params: list[Any] = [{"params": [m.param]} for m in members] if separate else [m.param for m in members]

        self.handle = construct(params, members[0].args | switches)
        if states is not None:
            state = copied(states[0]) if self.alone else list_state(states, separate=separate)
            load_state(self.handle, state, switches)

        # Torch's parameter group of each member by the member's id, where they are separate. The optimizer's list of
        # groups is set anew at each step, to those of the members that the step touches.
        self._group_of: dict[int, dict[str, Any]] | None = None
        if separate:
            self._group_of = dict(zip(map(id, members), optimizer_of(self.handle).param_groups, strict=True))

        # Fused SGD takes either parameters that have no momentum yet or others, but not both (torch 2.13).
        self._unstarted: set[int] = set()
        if switches.get("fused") and members[0].args.get("momentum"):
            values = optimizer_of(self.handle).state
            self._unstarted = {id(m) for m in members if values.get(m.param, {}).get("momentum_buffer") is None}
        self.last_call = 0
        self.num_in_row = 0
        for m in self.members:
            m.group = self

    @property
    def shares_hyper(self) -> bool:
        """Whether all members have the same hyper-parameters, in the one parameter group of torch's optimizer."""
        return self._group_of is None

    def absorb(self, other: ListGroup) -> None:
        """Takes over the members of another group with the same hyper-parameters."""
        # Nothing is copied: the state of each tensor changes hands, and the other optimizer is dropped.
        ours = optimizer_of(self.handle)
        ours.state.update(optimizer_of(other.handle).state)
        self.members.extend(other.members)
        self._unstarted |= other._unstarted
        self.is_final &= other.is_final
        if self._group_of is not None and other._group_of is not None:
            self._group_of.update(other._group_of)
            ours.param_groups = list(self._group_of.values())
        for m in other.members:
            m.group = self

    def remove(self, leaving: set[int]) -> None:
        """Forgets the members whose ids are in `leaving`."""
        optimizer = optimizer_of(self.handle)
        for m in self.members:
            if id(m) in leaving:
                optimizer.state.pop(m.param, None)
                m.group = None
        self.members = [m for m in self.members if id(m) not in leaving]
        self._unstarted -= leaving

        if self._group_of is not None:
            self._group_of = {id(m): self._group_of[id(m)] for m in self.members}
            optimizer.param_groups = list(self._group_of.values())
        else:
            optimizer.param_groups[0]["params"] = [m.param for m in self.members]

    def has_lost(self, member: ParamRecord) -> bool:
        """Returns whether `member` was moved since it was listed here: to another dtype, device or order of memory."""
        # Torch's state refers to the tensor, not to its memory: other storage of the same kind changes nothing here.
        p = member.param
        if p.dtype is not member.key[2] or p.device != member.key[3]:
            return True
        return not (self.alone or p.is_contiguous())

    def is_whole(self) -> bool:
        """Returns false: each member is looked at by itself."""
        return False

    def clip_(self, members: Sequence[ParamRecord]) -> None:
        """Clips the gradient of each of `members` by itself, in place."""
        for m in members:
            if m.clip.per_parameter and m.param.grad is not None:
                clip_each_([m.param.grad], m.clip)

    def step(self, members: Sequence[ParamRecord], *args: Any, **kwargs: Any) -> None:
        """Steps `members`, which are some or all of the group's, by their `.grad`."""
        optimizer = optimizer_of(self.handle)
        if self.alone:
            # An optimizer that wraps another one, as Lookahead does, has an attribute `optimizer` as schedules have.
            stepped = self.handle if isinstance(self.handle, torch.optim.Optimizer) else optimizer
            stepped.step(*args, **kwargs)
            return

        step = direct_step(self.handle)
        if not has_dense_gradients(tuple(m.param for m in members)):
            for m in members:  # the kernels take parameter, gradient and state to lie in one order (torch 2.13)
                if m.param.grad is not None and not m.param.grad.is_contiguous():
                    m.param.grad = m.param.grad.contiguous()

        # The optimizer is shown the members that this step touches and no others: a skipped parameter keeps its number
        # of steps, and its moments do not decay.
        if self._group_of is not None:
            optimizer.param_groups = [self._group_of[id(m)] for m in members]
            step(*args, **kwargs)
            return
        for batch in self._by_momentum(members):
            optimizer.param_groups[0]["params"] = [m.param for m in batch]
            step(*args, **kwargs)

    def _by_momentum(self, members: Sequence[ParamRecord]) -> Iterator[Sequence[ParamRecord]]:
        """Separates those of `members` that have no momentum yet from the others."""
        if not self._unstarted:
            yield members
            return
        first = [m for m in members if id(m) in self._unstarted]
        others = [m for m in members if id(m) not in self._unstarted]
        self._unstarted.difference_update(map(id, first))
        yield from filter(None, (first, others))

    def values_of(self, member: ParamRecord) -> dict[str, Any]:
        """Returns what torch keeps for one member; tensors are the optimizer's memory."""
        values: dict[str, Any] = optimizer_of(self.handle).state.get(member.param, {})
        return values

    def hyper_of(self, member: ParamRecord) -> dict[str, Any]:
        """Returns torch's parameter group that holds for one member."""
        groups = optimizer_of(self.handle).param_groups
        return groups[0] if self._group_of is None else self._group_of[id(member)]

    def learning_rates(self) -> list[float]:
        """Returns the learning rates of the members."""
        return _rates_of(self.handle)

    def packed(self) -> PackedState:
        """Returns the state of all members; tensors may be the optimizer's memory."""
        if self.alone:
            return PackedState(alone={self.members[0].name: copied(state_dict_of(self.handle), tensors=False)})
        columns, unpacked = pack_rows(self._rows(self.members))
        return PackedState(tuple(columns), {row.name: row.state() for row in unpacked})

    def states(self, members: Sequence[ParamRecord] | None = None) -> list[State]:
        """Returns the states of all members, or of `members`, in that order; they share no memory with the group."""
        if self.alone:
            return [copied(state_dict_of(self.handle))]
        return [row._replace(values=copied(row.values)).state() for row in self._rows(members or self.members)]

    def _rows(self, members: Sequence[ParamRecord]) -> Iterator[Row]:
        """Yields what torch keeps for each of `members`, in their order."""
        optimizer = optimizer_of(self.handle)
        values = dict(zip(map(id, optimizer.state), optimizer.state.values(), strict=True))  # tensors hash slowly
        frame: State = {}
        frame_key: Any = None

        for i, m in enumerate(members):
            if self._group_of is not None or i == 0:
                group = self.hyper_of(m)
                frame = with_schedule(self.handle, state_of_one(user_options(group, m.args, self.switches), {}))
                frame_key = None if self._group_of is None else exact_key(frame) or id(group)
            yield Row(m.name, values.get(id(m.param), {}), frame, frame_key)

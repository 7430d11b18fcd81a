"""Groups of parameters that are stepped together by one torch optimizer."""

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
from distopt.optim.clipping import Clip, clip_each_, clip_segments_
from distopt.optim.packed_state import PackedState, Row, StateColumns, exactly, pack_rows
from distopt.optim.packing import Arena, Block, blocks_of, bump_versions, gather, has_dense_gradients
from distopt.optim.state import (
    SCALARS,
    State,
    copied,
    is_scheduler,
    joined,
    load_into,
    optimizer_of,
    optimizer_part,
    state_dict_of,
    state_of_one,
)

_shape = attrgetter("shape")
_gradient = attrgetter("grad")


@dataclass(slots=True, eq=False)
class Member:
    """One parameter that the optimizer has seen.

    Attributes:
        param: the user's own tensor.
        name: its name in the parameter store, kept when the store forgets it.
        args: arguments of its torch optimizer.
        clip: how its gradient is clipped.
        key: what parameters must have in common to share a group: arguments, clip, dtype, device, birth.
        alone: whether it needs a torch optimizer of its own, without any switch that makes it quick.
        named: whether the parameter store has known it.
        group: where it is stepped; None before its first step.
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
    """Parameters behind one torch optimizer or scheduler, the `handle`."""

    handle: Any
    members: list[Member]
    extra: dict[str, Any]

    def states(self) -> list[State]:
        """Returns the states of all members, in their order; they share no memory with it."""

    def packed(self) -> PackedState:
        """Returns the states of all members in columns; tensors may be the optimizer's memory."""

    def has_lost(self, member: Member) -> bool:
        """Returns whether `member` was moved since it was placed here: to other storage, dtype or device."""

    def values_of(self, member: Member) -> dict[str, Any]:
        """Returns what torch keeps for one member; tensors are the optimizer's memory."""

    def hyper_of(self, member: Member) -> dict[str, Any]:
        """Returns torch's parameter group that `member` is in, perhaps with others."""


def reloaded(handle: Any, state: State | None, extra: dict[str, Any]) -> Any:
    """Loads `state` into a new `handle` (nothing when None) and sets the fast path's switches `extra` anew."""
    if state is not None:
        part = optimizer_part(state)
        for group in part["param_groups"]:
            group.update(extra)
        load_into(handle, state)
        optimizer = optimizer_of(handle)
        if part["state"]:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # no warning of a scheduler stepped first
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, values in part["state"].items():
            for key in SCALARS & values.keys() - {"step"}:  # torch casts them to the parameter's dtype, which rounds
                optimizer.state[params[i]][key] = values[key]
            for key, value in optimizer.state[params[i]].items():  # one-pass kernels go through memory in its order
                if isinstance(value, Tensor) and value.stride() != params[i].stride() and value.layout is torch.strided:
                    optimizer.state[params[i]][key] = _laid_out_as(value, params[i])
    return handle


def _laid_out_as(value: Tensor, param: Tensor) -> Tensor:
    """Returns state of the shape of `param` in the order of its memory; other state as it is."""
    return torch.empty_like(param).copy_(value) if value.shape == param.shape else value


def restored_switches(group: dict[str, Any], args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of parameter group `group` as the user's own optimizer would have them."""
    entries = {k: copied(v) for k, v in group.items() if k != "params"}
    for key in extra:
        if key in entries:
            entries[key] = args.get(key)
    return entries


def with_schedule(handle: Any, part: State) -> State:
    """Returns one parameter's state: its optimizer's `part`, and a copy of the schedule where there is one."""
    return {"scheduler": copied(handle.state_dict()), "optimizer": part} if is_scheduler(handle) else part


def direct_step(handle: Any) -> Callable[..., Any]:
    """Returns the optimizer's step without what torch wraps around it for profiling and compiling.

    The wrappers take longer than a step of small parameters. A scheduler counts calls of the wrapped one, so it stays.
    """
    if is_scheduler(handle):
        return handle.optimizer.step  # type: ignore[no-any-return]
    return partial(inspect.unwrap(type(handle).step), handle)


class PackedGroup:
    """Parameters of one life whose bytes lie side by side: the torch optimizer sees one flat tensor.

    Args:
        members: with packable parameters, of one dtype and device.
        construct: see `Construct`.
        extra: further arguments of the optimizer that make it quick without changing what it computes.
        states: one per member, equal in all that is not elementwise; None for parameters not stepped yet.
    """

    def __init__(
        self, members: Sequence[Member], construct: Construct, extra: dict[str, Any], states: Sequence[State] | None
    ) -> None:
        self.members = list(members)
        self.params = tuple(m.param for m in members)
        self.names = tuple(m.name for m in members)
        self.clip = members[0].clip
        self.extra = extra
        self.arena = Arena(self.params)
        flat = self.arena.flat
        self.handle = reloaded(
            construct([flat], members[0].args | extra), None if states is None else joined(states, flat=True), extra
        )
        self._step = direct_step(self.handle)
        self.buffer = torch.empty_like(flat)
        self._blocks: list[Block] = []
        self._segments: list[Tensor] = []
        self._index = {id(m): i for i, m in enumerate(self.members)}
        for m in self.members:
            m.group = self

    @property
    def numels(self) -> list[int]:
        """Number of elements of each parameter."""
        return self.arena.numels

    def has_lost(self, member: Member) -> bool:
        """Returns whether `member` was moved since it was placed here: to other storage, dtype or device."""
        i = self._index[id(member)]
        p = member.param
        return p.data_ptr() != self.arena.pointers[i] or p.numel() != self.numels[i] or not p.is_contiguous()

    def gather_(self, gradients: Sequence[Tensor] | None = None) -> Tensor | None:
        """Copies `gradients` of all members, or their `.grad`, into the group's buffer.

        Returns:
            The buffer; None when a member was moved to other memory.
        """
        done = None if gradients is not None else gather(self.params, self.arena.flat, self.buffer)
        if done is not None:
            return self.buffer if done else None
        if not self._blocks:
            if any(map(self.has_lost, self.members)):
                return None
            self._blocks = blocks_of(self.params, self.buffer)
        start = 0
        for block in self._blocks:
            end = start + len(block.params)
            if not block.copy_(None if gradients is None else gradients[start:end]):
                return None
            start = end
        return self.buffer

    def clip_(self, buffer: Tensor) -> bool:
        """Clips the gradient of each member by itself, in place; returns whether one changed."""
        return self.clip.per_parameter and clip_segments_(buffer, self.numels, self.clip)

    def write_gradients(self) -> None:
        """Copies the group's buffer back to each member's `.grad`."""
        if not self._segments:
            segments = torch.split(self.buffer, self.numels)
            self._segments = [s.view(p.shape) for s, p in zip(segments, self.params, strict=True)]
        torch._foreach_copy_(list(map(_gradient, self.params)), self._segments)

    def values_of(self, member: Member) -> dict[str, Any]:
        """Returns what torch keeps for one member; tensors are views of the optimizer's memory."""
        flat, index = self.arena.flat, self._index[id(member)]
        start = sum(self.numels[:index])
        segment = slice(start, start + self.numels[index])
        values = optimizer_of(self.handle).state.get(flat, {})
        return {
            key: value[segment].view(member.param.shape)
            if isinstance(value, Tensor) and value.shape == flat.shape
            else copied(value)
            for key, value in values.items()
        }

    def hyper_of(self, member: Member) -> dict[str, Any]:
        """Returns torch's parameter group, in which `params` is all of them."""
        return optimizer_of(self.handle).param_groups[0]

    def step(self, buffer: Tensor, *args: Any, **kwargs: Any) -> None:
        """Steps all members by the gradients in `buffer`, which may be overwritten."""
        self.arena.flat.grad = buffer
        self._step(*args, **kwargs)
        bump_versions(self.params)

    def columns(self) -> StateColumns:
        """Returns the state of all members, in their order; its columns are the optimizer's memory."""
        optimizer, flat = optimizer_of(self.handle), self.arena.flat
        values = optimizer.state.get(flat, {})
        columns = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.shape == flat.shape}
        scalars = {k: copied(v) for k, v in values.items() if k not in columns}
        shapes: tuple[Any, ...] = tuple(map(_shape, self.params)) if columns else ((),) * len(self.params)

        group = restored_switches(optimizer.param_groups[0], self.members[0].args, self.extra)
        shared = with_schedule(self.handle, state_of_one(group, scalars))
        return StateColumns(self.names, shapes, shared, columns)

    def packed(self) -> PackedState:
        """Returns the state of all members; its columns are the optimizer's memory."""
        return PackedState((self.columns(),))

    def states(self) -> list[State]:
        """Returns the states of all members, in their order: views of one copy for each kind of state.

        A copy for each member would take ten times as long, and as long again to save.
        """
        live = self.columns()
        return replace(live, columns={key: column.clone() for key, column in live.columns.items()}).states()


class ListGroup:
    """Parameters of equal hyper-parameters and any number of steps: torch's list of tensors, a state for each.

    Where the optimizer changes its hyper-parameters as it steps, each parameter has a torch parameter group of its own.

    Args:
        members: parameters of one dtype and device, or a single one of any kind.
        construct: see `Construct`.
        extra: further arguments of the optimizer that make it quick without changing what it computes.
        states: one per member, of equal hyper-parameters; None for parameters not stepped yet.
    """

    def __init__(
        self, members: Sequence[Member], construct: Construct, extra: dict[str, Any], states: Sequence[State] | None
    ) -> None:
        self.members = list(members)
        self.extra = extra
        self.alone = members[0].alone
        apart = not self.alone and drifts(members[0].args)
        params: list[Any] = [{"params": [m.param]} for m in members] if apart else [m.param for m in members]
        handle = construct(params, members[0].args | extra)
        if states is not None:
            state = copied(states[0]) if self.alone else joined(states, flat=False, apart=apart)
            handle = reloaded(handle, state, extra)
        self.handle = handle
        self._own: dict[int, dict[str, Any]] | None = None  # parameter groups by id of the member, where they are apart
        if apart:
            self._own = dict(zip(map(id, members), optimizer_of(handle).param_groups, strict=True))
        # Fused SGD takes either parameters that have no momentum yet or others, but not both (torch 2.13).
        self._unstarted: set[int] = set()
        if extra.get("fused") and members[0].args.get("momentum"):
            state = optimizer_of(handle).state
            self._unstarted = {id(m) for m in members if state.get(m.param, {}).get("momentum_buffer") is None}
        for m in self.members:
            m.group = self

    @property
    def is_apart(self) -> bool:
        """Whether each parameter has hyper-parameters of its own."""
        return self._own is not None

    def absorb(self, other: ListGroup) -> None:
        """Takes over the members of another group with the same hyper-parameters."""
        mine, theirs = optimizer_of(self.handle), optimizer_of(other.handle)
        mine.state.update(theirs.state)
        self.members.extend(other.members)
        self._unstarted |= other._unstarted
        if self._own is not None and other._own is not None:
            self._own.update(other._own)
            mine.param_groups = list(self._own.values())
        for m in other.members:
            m.group = self

    def remove(self, gone: set[int]) -> None:
        """Forgets the members whose ids are in `gone`."""
        optimizer = optimizer_of(self.handle)
        for m in self.members:
            if id(m) in gone:
                optimizer.state.pop(m.param, None)
                m.group = None
        self.members = [m for m in self.members if id(m) not in gone]
        self._unstarted -= gone
        if self._own is not None:
            self._own = {id(m): self._own[id(m)] for m in self.members}
            optimizer.param_groups = list(self._own.values())
        else:
            optimizer.param_groups[0]["params"] = [m.param for m in self.members]

    def has_lost(self, member: Member) -> bool:
        """Returns whether `member` was moved since it was placed here: to other storage, dtype or device."""
        p = member.param
        if p.dtype is not member.key[2] or p.device != member.key[3]:
            return True
        return not (self.alone or p.is_contiguous())

    def clip_(self, members: Sequence[Member]) -> None:
        """Clips the gradient of each of `members` by itself, in place."""
        for m in members:
            if m.clip.per_parameter and m.param.grad is not None:
                clip_each_([m.param.grad], m.clip)

    def step(self, members: Sequence[Member], *args: Any, **kwargs: Any) -> None:
        """Steps `members`, which are some or all of its own, by their `.grad`."""
        optimizer = optimizer_of(self.handle)
        if self.alone:
            optimizer.step(*args, **kwargs)
            return
        step = direct_step(self.handle)
        if self.extra.get("fused") and not has_dense_gradients(tuple(m.param for m in members)):
            for m in members:  # the kernels take parameter, gradient and state to lie in one order (torch 2.13)
                if m.param.grad is not None and not m.param.grad.is_contiguous():
                    m.param.grad = m.param.grad.contiguous()
        if self._own is not None:
            optimizer.param_groups = [self._own[id(m)] for m in members]
            step(*args, **kwargs)
            return
        for part in self._by_momentum(members):
            optimizer.param_groups[0]["params"] = [m.param for m in part]
            step(*args, **kwargs)

    def _by_momentum(self, members: Sequence[Member]) -> Iterator[Sequence[Member]]:
        """Parts those of `members` that have no momentum yet from the others."""
        if not self._unstarted:
            yield members
            return
        first = [m for m in members if id(m) in self._unstarted]
        others = [m for m in members if id(m) not in self._unstarted]
        self._unstarted.difference_update(map(id, first))
        yield from filter(None, (first, others))

    def values_of(self, member: Member) -> dict[str, Any]:
        """Returns what torch keeps for one member, its own memory."""
        values: dict[str, Any] = optimizer_of(self.handle).state.get(member.param, {})
        return values

    def hyper_of(self, member: Member) -> dict[str, Any]:
        """Returns torch's parameter group of one member."""
        group: dict[str, Any] = (
            optimizer_of(self.handle).param_groups[0] if self._own is None else self._own[id(member)]
        )
        return group

    def packed(self) -> PackedState:
        """Returns the state of all members; tensors may be the optimizer's memory."""
        if self.alone:
            return PackedState(alone={self.members[0].name: copied(state_dict_of(self.handle), tensors=False)})
        columns, unpacked = pack_rows(self._rows())
        return PackedState(tuple(columns), {row.name: row.state() for row in unpacked})

    def states(self) -> list[State]:
        """Returns the states of all members, in their order; they share no memory with it."""
        if self.alone:
            return [copied(state_dict_of(self.handle))]
        return [row._replace(values=copied(row.values)).state() for row in self._rows()]

    def _rows(self) -> Iterator[Row]:
        """Yields what torch keeps for each member, in their order."""
        optimizer = optimizer_of(self.handle)
        values = dict(zip(map(id, optimizer.state), optimizer.state.values(), strict=True))  # tensors hash slowly
        frame: State = {}
        for i, m in enumerate(self.members):
            own = None if self._own is None else self._own[id(m)]
            if own is not None or i == 0:
                group = restored_switches(own or optimizer.param_groups[0], m.args, self.extra)
                frame = with_schedule(self.handle, state_of_one(group, {}))
            key = None if own is None else exactly(frame) or id(own)
            yield Row(m.name, values.get(id(m.param), {}), frame, key)

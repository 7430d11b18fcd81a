"""Optimizer state in columns: what many parameters share is held once, and their tensors lie in one flat tensor each.

`PyroOptim.get_state()` gives every parameter a separate state dict, as `pyro.optim` does. For a thousand parameters
that are stepped together these are a thousand equal `param_groups` and three thousand tensors cut from three. A
checkpoint needs neither the dicts nor the cuts: `PyroOptim.packed_state()` hands out the three tensors.
"""

from __future__ import annotations

import marshal
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.optim.packing import MAX_NUMEL
from distopt.optim.state import SCALARS, State, copied, optimizer_state, state_of_one, with_optimizer_state

Shape = tuple[int, ...]
_layout = attrgetter("layout")
_dtype = attrgetter("dtype")
_device = attrgetter("device")
_is_cpu = attrgetter("is_cpu")  # quicker than the device, which is an object for each call
_shape = attrgetter("shape")


@dataclass(frozen=True, eq=False)
class StateColumns:
    """State of parameters that share everything but elementwise tensors.

    Attributes:
        names: Names of the parameters, each once.
        shapes: Shape that the elementwise tensors of each parameter have: that of the parameter (`DCTAdam` keeps longer
            ones for time series); all `()` where there are no columns.
        shared: State dict of one parameter without its elementwise tensors: `{"state": {0: scalars}, "param_groups":
            [one]}`, or `{"scheduler": ..., "optimizer": ...}` with such a dict. A scalar is a number, None, or a tensor
            of one element (`step`).
        columns: By key of the state, shape (sum of the parameters' numels,): the elementwise tensors in the order of
            `names`, each in row-major order. May be the optimizer's memory: not to be written to, and read (or copied)
            before the next step.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    shared: State
    columns: dict[str, Tensor]

    def states(self) -> list[State]:
        """Returns the state dict of each parameter, in the order of `names`.

        Elementwise tensors are views of the columns; the rest is a copy for each parameter.

        Raises:
            RuntimeError: A column is not as long as the shapes together.
        """
        count = len(self.names)
        optimizer = optimizer_state(self.shared)
        group = optimizer["param_groups"][0]

        # By key, one value for each parameter; then a dict for each parameter.
        values: dict[str, Sequence[Any]] = {}
        for key, value in optimizer["state"].get(0, {}).items():
            # One element of a new tensor for each: torch counts a `step` up in place.
            values[key] = (
                value.repeat(count, *[1] * value.dim()).unbind() if isinstance(value, Tensor) else [value] * count
            )
        for key, column in self.columns.items():
            segments = torch.split_with_sizes(column, self.numels())
            values[key] = [
                s if len(shape) == 1 else s.view(shape) for s, shape in zip(segments, self.shapes, strict=True)
            ]

        if not values:
            return [with_optimizer_state(self.shared, state_of_one(group, {})) for _ in self.names]
        each = (dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True))
        return [with_optimizer_state(self.shared, state_of_one(group, state)) for state in each]

    def select(self, keep: Sequence[bool]) -> StateColumns:
        """Returns the columns of those parameters alone for which `keep`, in the order of `names`, is true.

        Where that is neither all of them nor one, the columns are copies.
        """
        if all(keep):
            return self

        def joined(column: Tensor) -> Tensor:
            return _joined(list(compress(torch.split_with_sizes(column, self.numels()), keep)))

        return StateColumns(
            tuple(compress(self.names, keep)),
            tuple(compress(self.shapes, keep)),
            self.shared,
            {key: joined(column) for key, column in self.columns.items()},
        )

    def numels(self) -> list[int]:
        """Returns the number of elements that each parameter has in every column."""
        return list(map(math.prod, self.shapes))


@dataclass(frozen=True, eq=False)
class PackedState:
    """State of an optimizer by parameter, in columns where parameters share the rest.

    Holds what `PyroOptim.get_state()` returns: `packed.unpack()` equals it, and `PackedState.from_states(states)` packs
    it again. So state of old checkpoints, of `pyro.optim` and of another rank (where other parameters may share their
    columns) can be brought into this form, and every packed state can be written as `pyro.optim` reads it.

    Attributes:
        columns: State of parameters that share all but elementwise tensors. No name occurs twice.
        alone: State dict of each parameter that packs with no other, by name: of optimizers that are not elementwise
            (SparseAdam, Muon), and state that is more than elementwise tensors and numbers.

    Example:
        >>> import pyro
        >>> from distopt.optim import Adam
        >>> pyro.clear_param_store()
        >>> params = [pyro.param(name, torch.ones(2)).unconstrained() for name in "xy"]
        >>> sum(params).sum().backward()
        >>> optim = Adam({"lr": 0.1})
        >>> optim(params)
        >>> [columns] = optim.packed_state().columns
        >>> columns.names, columns.shared["state"], columns.columns["exp_avg"]
        (('x', 'y'), {0: {'step': tensor(1.)}}, tensor([0.1000, 0.1000, 0.1000, 0.1000]))
        >>> optim.packed_state().unpack()["y"]["state"][0]["exp_avg"]
        tensor([0.1000, 0.1000])
    """

    columns: tuple[StateColumns, ...] = ()
    alone: dict[str, State] = field(default_factory=dict)

    @classmethod
    def from_states(cls, states: Mapping[str, State]) -> PackedState:
        """Packs state dicts of one parameter each, by name, as `PyroOptim.get_state()` returns them.

        Parameters come together that are equal in all but their elementwise tensors, type by type and bit by bit: the
        first tensor of a state tells the parameter's shape, and every tensor of that shape goes into a column.

        Args:
            states: Not changed. Tensors may become part of the result without a copy.
        """
        alone: dict[str, State] = {}
        columns, unpacked = pack_rows(_rows_of(states, alone))
        return cls(tuple(columns), alone | {row.name: states[row.name] for row in unpacked})

    @classmethod
    def merged(cls, states: Iterable[PackedState]) -> PackedState:
        """Returns the state of all parameters in `states`, none of which may be in two of them."""
        states = list(states)
        alone = {name: state for each in states for name, state in each.alone.items()}
        return cls(tuple(columns for each in states for columns in each.columns), alone)

    def unpack(self) -> dict[str, State]:
        """Returns the state dict of each parameter by name; elementwise tensors are views of the columns."""
        states = dict(self.alone)
        for columns in self.columns:
            states.update(zip(columns.names, columns.states(), strict=True))
        return states

    def names(self) -> Iterator[str]:
        """Yields the name of every parameter whose state this holds."""
        for columns in self.columns:
            yield from columns.names
        yield from self.alone

    def select(self, keep: Callable[[str], bool]) -> PackedState:
        """Returns the state of those parameters alone for whose name `keep` returns true.

        Cost: one call of `keep` for each name, and a copy of those columns that lose parameters.
        """
        kept = [(columns, [keep(name) for name in columns.names]) for columns in self.columns]
        return PackedState(
            tuple(columns.select(flags) for columns, flags in kept if any(flags)),
            {name: state for name, state in self.alone.items() if keep(name)},
        )


# Packing of states that lie one by one: those of `get_state()`, and those of torch's optimizers over lists of tensors.
#
# Rows are sorted twice. First by what can be compared without reading a tensor: the frame, keys, types, dtypes and
# plain values. Then by their scalar tensors, all of a kind read at once, since each read of one waits for its device.
# What is then in one heap differs in its elementwise tensors alone, and these are concatenated, one call for each key.
#
# A thousand rows mostly are of one kind, so they are looked at key by key, a whole column at once: that is a few sets
# of a thousand attributes, where a description of each row would be a thousand lists of labels.


class Row(NamedTuple):
    """What torch keeps for one parameter, before it is packed.

    Attributes:
        name: The parameter's name.
        values: Its state by key.
        frame: The rest of its state dict: hyper-parameters and schedule, and an empty `state`.
        frame_key: Equal for rows with equal frames.
    """

    name: str
    values: Mapping[str, Any]
    frame: State
    frame_key: Hashable

    def state(self) -> State:
        """Returns the state dict; its tensors are those of `values`."""
        hyper = optimizer_state(self.frame)["param_groups"][0]
        return with_optimizer_state(self.frame, state_of_one(hyper, dict(self.values)))


def pack_rows(rows: Iterable[Row]) -> tuple[list[StateColumns], list[Row]]:
    """Returns the rows in columns, and those that do not pack."""
    by_frame: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        by_frame[row.frame_key, tuple(row.values)].append(row)

    columns: list[StateColumns] = []
    unpacked: list[Row] = []
    for of_frame in by_frame.values():
        shapes = _shapes_if_uniform(of_frame)
        if shapes is not None:
            columns += _columns_of_kind(of_frame, shapes)
            continue
        kinds: dict[Hashable, list[tuple[Row, Shape]]] = defaultdict(list)
        for row in of_frame:
            described = _describe(row)
            if described is None:
                unpacked.append(row)
            else:
                kinds[described[0]].append((row, described[1]))
        for of_kind in kinds.values():
            columns += _columns_of_kind([row for row, _ in of_kind], [shape for _, shape in of_kind])
    return columns, unpacked


def _shapes_if_uniform(rows: Sequence[Row]) -> list[Shape] | None:
    """Returns the shape of each row if `_describe` would give all of them the same labels; None otherwise.

    It asks the same questions of whole columns, and leaves all that is out of the ordinary to `_describe`.
    """
    states = [row.values for row in rows]
    shapes: list[Shape] | None = None
    for key in states[0]:
        column = [state[key] for state in states]
        if set(map(type, column)) != {Tensor} or set(map(_layout, column)) != {torch.strided}:
            return None
        if len(set(map(_dtype, column))) > 1:
            return None
        if not all(map(_is_cpu, column)) and len(set(map(_device, column))) > 1:
            return None

        of_key: list[Shape] = list(map(_shape, column))
        distinct = set(of_key)
        if key in SCALARS and all(math.prod(shape) == 1 for shape in distinct):
            if len(distinct) > 1:
                return None
        elif shapes is None:
            shapes = of_key
        elif shapes != of_key:
            return None
    return [()] * len(rows) if shapes is None else shapes


def _describe(row: Row) -> tuple[Hashable, Shape] | None:
    """Returns what a row must have in common with another to be packed with it, and the shape of its tensors.

    The shape is that of its first tensor that is no scalar, `()` without one. None for a row that no columns can hold.
    """
    labels: list[Hashable] = []
    shape: Shape | None = None
    for key, value in row.values.items():
        if type(value) is not Tensor:
            text = exact_key(value)
            if text is None:
                return None
            labels.append((key, text))
        elif value.layout is not torch.strided:
            return None
        elif _is_scalar(key, value):
            labels.append((key, value.dtype, value.device, value.shape))
        else:
            shape = value.shape if shape is None else shape
            if value.shape != shape:
                return None
            labels.append((key, value.dtype, value.device))
    return tuple(labels), shape or ()


def _columns_of_kind(rows: Sequence[Row], shapes: Sequence[Shape]) -> Iterator[StateColumns]:
    """Yields columns of rows that are equal in all but the numbers in their tensors."""
    first = rows[0].values
    tensors = [key for key, value in first.items() if isinstance(value, Tensor)]
    scalars = [key for key in tensors if _is_scalar(key, first[key])]
    elementwise = [key for key in tensors if key not in scalars]

    numbers = [_numbers([row.values[key] for row in rows]) for key in scalars]
    if all(len(set(each)) == 1 for each in numbers):
        yield from _columns_of_equal(rows, shapes, elementwise)
        return
    by_numbers: dict[Hashable, list[int]] = defaultdict(list)
    for index, each in enumerate(zip(*numbers, strict=True)):
        by_numbers[each].append(index)
    for equal in by_numbers.values():
        yield from _columns_of_equal([rows[i] for i in equal], [shapes[i] for i in equal], elementwise)


def _columns_of_equal(
    rows: Sequence[Row], shapes: Sequence[Shape], elementwise: Sequence[str]
) -> Iterator[StateColumns]:
    """Yields columns of rows that are equal in all but elementwise tensors.

    Large tensors are columns by themselves, which need no copy: to join them would take the memory of the state once
    more, and a column of one costs nothing that its size would not.
    """
    small: list[int] = []
    batches = [small]
    for index, numel in enumerate(map(math.prod, shapes)):
        if numel <= MAX_NUMEL:
            small.append(index)
        else:
            batches.append([index])

    frame = rows[0].frame
    hyper = optimizer_state(frame)["param_groups"][0]
    for batch in filter(None, batches):
        members = rows if len(batch) == len(rows) else [rows[index] for index in batch]
        scalars = {key: copied(value) for key, value in members[0].values.items() if key not in elementwise}
        yield StateColumns(
            tuple(row.name for row in members),
            tuple(tuple(shapes[index]) for index in batch),
            with_optimizer_state(frame, state_of_one(hyper, scalars)),
            {key: _joined([row.values[key] for row in members]) for key in elementwise},
        )


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the elements of all `tensors` side by side; of a single contiguous one its memory."""
    with torch.no_grad():
        flats = [t if t.dim() == 1 else t.reshape(-1) for t in tensors]
        return flats[0] if len(flats) == 1 else torch.cat(flats)


def _rows_of(states: Mapping[str, State], alone: dict[str, State]) -> Iterator[Row]:
    """Yields the row of each state dict; adds those to `alone` that are not of one parameter and plain values."""
    frames: dict[Hashable, State] = {}  # one for all rows that have an equal one
    for name, state in states.items():
        optimizer = optimizer_state(state)
        groups = optimizer["param_groups"]
        values = optimizer["state"]
        is_whole = len(optimizer) == 2 and (optimizer is state or state.keys() == {"scheduler", "optimizer"})
        if not is_whole or len(groups) != 1 or len(values) > 1 or (values and 0 not in values):
            alone[name] = state
            continue

        key = exact_key(groups if optimizer is state else (state["scheduler"], groups))
        if key is None or groups[0].get("params") != [0]:
            alone[name] = state
            continue
        frame = frames.get(key)
        if frame is None:
            of_optimizer = optimizer | {"state": {}}
            frame = frames[key] = of_optimizer if optimizer is state else {**state, "optimizer": of_optimizer}
        yield Row(name, values[0] if values else {}, frame, key)


def _is_scalar(key: str, value: Tensor) -> bool:
    return key in SCALARS and value.numel() == 1


def _numbers(scalars: Sequence[Tensor]) -> list[Any]:
    """Returns tensors of one element, all on one device, as numbers; those of an accelerator are read together."""
    if scalars[0].device.type == "cpu":
        return [scalar.item() for scalar in scalars]
    return torch.stack(list(scalars)).reshape(-1).tolist()


def exact_key(value: Any) -> bytes | None:
    """Returns bytes that are equal for equal plain values alone; None for a value that is not plain.

    `marshal` tells 1 from 1.0 and True, and tuples from lists. Its version 2 writes no references, which would make
    equal values differ by which of their items are one object.
    """
    try:
        return marshal.dumps(value, 2)
    except ValueError:
        return None

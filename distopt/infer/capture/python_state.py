"""What a step changes in objects of the user's, to be seen and put back."""

from __future__ import annotations

import builtins
import random
from collections import deque
from collections.abc import Iterator, Mapping
from types import CellType, FrameType, MemberDescriptorType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.infer.capture.comparisons import MAX_COMPARED_BYTES
from distopt.infer.capture.watch import PLAIN, content, names_of

_DEPTH = 4
_MAX_ITEMS = 64
_MISSING: Any = object()
_GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, torch.Generator)


class PythonState:
    """Values as they were before functions of the user's ran: those that the functions name, and their containers.

    A `Watch` tells it of each function as it is called. It sees what the function's own code can change: globals,
    variables that it closes over, attributes that it names, and lists, dictionaries, sets and small arrays of NumPy
    that these hold.

    Args:
        earlier: The state of the same step, taken before: objects that were not there then are new in each step, and
            nobody sees what becomes of them.

    Attributes:
        passing: What cannot be put back: iterators, and generators of random numbers of the user's own.
    """

    def __init__(self, earlier: PythonState | None = None) -> None:
        self.passing: list[str] = []
        self._earlier = earlier
        self._values: dict[tuple[int, str], tuple[Any, str, Any]] = {}  # by owner and name: both, and the value
        self._containers: dict[int, tuple[Any, Any]] = {}  # by id: the container, and a copy
        self._closed_over: dict[int, dict[str, Any]] = {}  # by frame, until its cells are known
        self._noted: set[tuple[int, ...]] = set()
        self._kept: list[Any] = []  # so that no other object gets the id of one that was seen

    def note(self, frame: FrameType) -> None:
        """Notes what a function may change that begins now."""
        local = frame.f_locals
        key = (id(frame.f_code), *map(id, local.values()))
        if key in self._noted:
            return
        self._noted.add(key)
        self._kept += local.values()
        names = names_of(frame.f_code)
        seen: set[int] = set()
        for name in names.roots - vars(builtins).keys():
            self._note_value(frame.f_globals, name, names.attributes, seen, _DEPTH)
        for value in local.values():
            self._note_object(value, names.attributes, seen, _DEPTH)
        self._closed_over[id(frame)] = {name: local[name] for name in frame.f_code.co_freevars if name in local}

    def note_cells(self, frame: FrameType, cells: Mapping[str, CellType]) -> None:
        """Notes where a function that was noted finds the variables that it closes over."""
        for name, value in self._closed_over.pop(id(frame), {}).items():
            self._values.setdefault((id(cells[name]), name), (cells[name], name, value))

    def changed(self) -> list[str]:
        """Returns the names of what is not as it was."""
        names = [
            name
            for owner, name, value in self._values.values()
            if self._counts(owner, name) and not _same(_read(owner, name), value)
        ]
        kinds = [
            type(owner).__name__
            for owner, copy in self._containers.values()
            if self._counts(owner) and not _same_items(_items(owner), copy)
        ]
        return [*names, *(f"a {kind}" for kind in kinds)]

    def put_back(self) -> None:
        """Gives everything the value that it had."""
        for owner, name, value in self._values.values():
            if not _same(_read(owner, name), value):
                _write(owner, name, value)
        for owner, copy in self._containers.values():
            if not _same_items(_items(owner), copy):
                _refill(owner, copy)

    def _counts(self, owner: Any, name: str | None = None) -> bool:
        if self._earlier is None:
            return True
        if name is None:
            return id(owner) in self._earlier._containers
        return (id(owner), name) in self._earlier._values

    def _note_value(self, owner: Any, name: str, attributes: frozenset[str], seen: set[int], depth: int) -> None:
        value = _read(owner, name)
        self._values.setdefault((id(owner), name), (owner, name, value))
        self._note_object(value, attributes, seen, depth)

    def _note_object(self, value: Any, attributes: frozenset[str], seen: set[int], depth: int) -> None:
        if depth == 0 or id(value) in seen or value is _MISSING or isinstance(value, (Tensor, ModuleType, *PLAIN)):
            return
        seen.add(id(value))
        if isinstance(value, (Iterator, *_GENERATORS)):
            self.passing.append(f"a {type(value).__name__}")
            return
        items = _items(value)
        if items is not None:
            self._containers.setdefault(id(value), (value, items))
        inner = value if isinstance(value, tuple) else items
        if inner is not None and not isinstance(inner, np.ndarray) and len(inner) <= _MAX_ITEMS:
            for each in inner.values() if isinstance(inner, dict) else inner:
                self._note_object(each, attributes, seen, depth - 1)
        for owner, name in _attributes(value, attributes):
            self._note_value(owner, name, attributes, seen, depth - 1)


def _attributes(value: Any, names: frozenset[str]) -> Iterator[tuple[Any, str]]:
    """Yields those attributes of an object and its classes that have one of the names, each with what holds it."""
    if hasattr(value, "__dict__") and not isinstance(value, type):
        yield from ((vars(value), name) for name in names)
    for kind in (value if isinstance(value, type) else type(value)).__mro__:
        for name in names & vars(kind).keys():
            if isinstance(vars(kind)[name], MemberDescriptorType):
                yield value, name
            elif isinstance(vars(kind)[name], (*PLAIN, list, dict, set)):
                yield kind, name


def _read(owner: Any, name: str) -> Any:
    if isinstance(owner, CellType):
        return content(owner)
    if isinstance(owner, dict):
        return owner.get(name, _MISSING)
    return vars(owner).get(name, _MISSING) if isinstance(owner, type) else getattr(owner, name, _MISSING)


def _write(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, CellType):
        owner.cell_contents = value
    elif isinstance(owner, dict):
        owner.pop(name, None)
        if value is not _MISSING:
            owner[name] = value
    elif value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, PLAIN) and bool(a == b))


def _items(value: Any) -> Any:
    """Returns a copy of what a container holds, None for anything else."""
    if isinstance(value, np.ndarray):
        return value.copy() if value.nbytes <= MAX_COMPARED_BYTES else None
    if isinstance(value, dict):
        return dict(value)
    return [*value] if isinstance(value, list | set | deque) else None


def _same_items(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return [*map(id, a)] == [*map(id, b)] and all(map(_same, a.values(), b.values()))
    return len(a) == len(b) and all(map(_same, a, b))


def _refill(owner: Any, copy: Any) -> None:
    if isinstance(owner, np.ndarray):
        owner[...] = copy
        return
    owner.clear()
    owner.extend(copy) if isinstance(owner, list | deque) else owner.update(copy)

"""What a step changes in objects of the user's, to be put back."""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Iterator, Mapping
from types import CellType, FrameType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from distopt.infer.capture.comparisons import MAX_COMPARED_BYTES
from distopt.infer.capture.reachable import GENERATORS, GLOBAL_GENERATORS
from distopt.infer.capture.watch import PLAIN, content, is_user_code, is_user_file, names_of

_DEPTH = 6
_MAX_OBJECTS = 20_000
_MISSING: Any = object()
_FIXED = (FunctionType, staticmethod, classmethod, property, MemberDescriptorType, GetSetDescriptorType)


class PythonState:
    """Values as they were before functions of the user's ran, of what these can reach.

    A `Watch` tells it of each function as it is called. It keeps globals, variables that a function closes over, and
    attributes, buffers, lists, dictionaries, sets and small arrays of NumPy that hang together with them or with the
    arguments, up to 20,000 objects.
    """

    def __init__(self) -> None:
        self._passing: list[tuple[str, str]] = []  # iterators: the attribute that holds each, and its type
        self._named: set[str] = {""}
        self._computes = False  # whether attributes may be read under other names
        self._values: dict[tuple[int, str], tuple[Any, str, Any]] = {}  # by owner and name: both, and the value
        self._containers: dict[int, tuple[Any, Any]] = {}  # by id: the container, and a copy
        self._closed_over: dict[int, dict[str, Any]] = {}  # by frame, until its cells are known
        self._seen: dict[int, Any] = {}  # by id, and kept, so that no other object gets it

    def note(self, frame: FrameType) -> None:
        """Notes what a function may change that begins now."""
        local = {name: value for name, value in frame.f_locals.items() if not name.startswith(".")}
        self._closed_over[id(frame)] = {name: local[name] for name in frame.f_code.co_freevars if name in local}
        names = names_of(frame.f_code)
        self._named |= names.attributes
        self._computes |= names.computed
        for name in names.roots - vars(builtins).keys():
            self._note_value(frame.f_globals, name, _DEPTH, "")
        # What a function is given by another one of the user's may be new in each step.
        is_old = not _has_caller(frame)
        for name, value in local.items():
            self._note_object(value, _DEPTH, "" if is_old or name in frame.f_code.co_freevars else None)

    def note_cells(self, frame: FrameType, cells: Mapping[str, CellType]) -> None:
        """Notes where a function that was noted finds the variables that it closes over."""
        for name, value in self._closed_over.pop(id(frame), {}).items():
            self._values.setdefault((id(cells[name]), name), (cells[name], name, value))

    def passing(self) -> list[str]:
        """Returns what was there before the step, is named, and cannot be put back: iterators, generators."""
        return [kind for holder, kind in self._passing if self._computes or holder in self._named]

    def put_back(self) -> None:
        """Gives everything the value that it had."""
        for owner, name, value in self._values.values():
            if _read(owner, name) is not value:
                _write(owner, name, value)
        for owner, copy in self._containers.values():
            if not _same_items(_items(owner), copy):
                _refill(owner, copy)

    # Objects are noted with the attribute that holds them, "" for none; None where they may be new in each step.

    def _note_value(self, owner: Any, name: str, depth: int, holder: str | None) -> None:
        if (id(owner), name) not in self._values:
            value = _read(owner, name)
            self._values[id(owner), name] = (owner, name, value)
            self._note_object(value, depth, holder)

    def _note_object(self, value: Any, depth: int, holder: str | None) -> None:
        is_done = depth == 0 or id(value) in self._seen or len(self._seen) >= _MAX_OBJECTS
        if is_done or value is _MISSING or isinstance(value, (Tensor, FunctionType, *PLAIN)):
            return
        self._seen[id(value)] = value
        if isinstance(value, (Iterator, *GENERATORS)):
            if holder is not None and not any(value is each for each in GLOBAL_GENERATORS):  # these are put back
                self._passing.append((holder, f"a {type(value).__name__}"))
            return
        items = _items(value)
        if items is not None:
            self._containers[id(value)] = (value, items)
        inner = value if isinstance(value, tuple) else items
        if inner is not None and not isinstance(inner, np.ndarray):
            for each in inner.values() if isinstance(inner, dict) else inner:
                self._note_object(each, depth - 1, holder)
        for owner, name in _attributes(value):
            self._note_value(owner, name, depth - 1, None if holder is None else name)


def _has_caller(frame: FrameType) -> bool:
    """Returns whether a function runs on behalf of another one of the user's."""
    caller = frame.f_back
    while caller is not None and caller.f_globals.get("__name__") != "distopt.infer.capture.compiled":
        if is_user_code(caller):
            return True
        caller = caller.f_back
    return False


def _attributes(value: Any) -> Iterator[tuple[Any, str]]:
    """Yields the attributes of an object and of its classes, each with what holds it."""
    table = _table(value)
    if isinstance(value, ModuleType):
        if is_user_file(str(getattr(value, "__file__", ""))):
            yield from ((table, name) for name in [*table])
        return
    is_type = isinstance(value, type)
    if table is not None and not is_type:
        yield from ((table, name) for name in [*table])
    for kind in value.__mro__ if is_type else type(value).__mro__:
        if kind.__module__.split(".")[0] in ("builtins", "torch", "pyro", "numpy", "distopt"):
            continue
        for name, held in [*vars(kind).items()]:
            if isinstance(held, MemberDescriptorType):
                if not is_type and "__slots__" in vars(kind):  # members of classes in C may be read-only
                    yield value, name
            elif not (isinstance(held, _FIXED) or name.startswith("__")):
                yield kind, name


def _table(value: Any) -> Any:
    """Returns an object's own `__dict__`, whatever its class makes of attributes; None where it has none."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def _read(owner: Any, name: str) -> Any:
    if isinstance(owner, CellType):
        return content(owner)
    if isinstance(owner, dict):
        return owner.get(name, _MISSING)
    if isinstance(owner, type):
        return vars(owner).get(name, _MISSING)
    try:
        return object.__getattribute__(owner, name)
    except AttributeError:
        return _MISSING


def _write(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, CellType):
        owner.cell_contents = value
    elif isinstance(owner, dict):
        owner.pop(name, None)
        if value is not _MISSING:
            owner[name] = value
    elif isinstance(owner, type):
        type.__setattr__(owner, name, value)
    elif value is _MISSING:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, value)


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
        return [*map(id, a), *map(id, a.values())] == [*map(id, b), *map(id, b.values())]
    return [*map(id, a)] == [*map(id, b)]


def _refill(owner: Any, copy: Any) -> None:
    if isinstance(owner, np.ndarray):
        owner[...] = copy
        return
    owner.clear()
    owner.extend(copy) if isinstance(owner, list | deque) else owner.update(copy)

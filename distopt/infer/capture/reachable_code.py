"""Tests of what can be reached from modules, functions and classes that code reads."""

from __future__ import annotations

import abc
import collections
import datetime
import decimal
import fractions
import functools
import gc
import itertools
import os
import pathlib
import re
import sys
import types
import uuid
from typing import Any

import numpy as np
import torch
from pyro.poutine import Trace

from distopt.infer.capture.comparisons import Comparisons, is_plain
from distopt.infer.capture.watch import content, is_user_file
from distopt.infer.sharded_plate import Sharded

# Objects whose contents never change.
FIXED = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType),
    *(types.MemberDescriptorType, types.ClassMethodDescriptorType, types.MethodWrapperType, types.EllipsisType),
    *(types.CodeType, types.GenericAlias, types.UnionType, property, classmethod, staticmethod, np.dtype, np.ufunc),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, decimal.Decimal, fractions.Fraction),
    *(
        pathlib.PurePath,
        re.Pattern,
        uuid.UUID,
        torch.memory_format,
        torch.layout,
    ),
    *(
        type(collections.namedtuple("_", "x").__dict__["x"]),
        torch._ops.OpOverload,
        torch._ops.OpOverloadPacket,
        functools.cached_property,
        type(dict.fromkeys),
        Trace,
    ),
)
_MEMBERS = (types.FunctionType, property, classmethod, staticmethod)
CONTAINERS = (
    *(dict, collections.OrderedDict, collections.defaultdict, types.MappingProxyType),
    *(list, tuple, set, frozenset, collections.deque),
)


class ReachableCode(Comparisons, abc.ABC):
    """Follows modules, functions and classes; what they hold is followed by `add`, as of all objects.

    Args:
        read: Names of attributes that the code reads.
        computed: Whether it computes some of these names.
    """

    def __init__(self, read: frozenset[str], *, computed: bool) -> None:
        super().__init__()
        self._read = read
        self._computed = computed
        self._walked: set[int] = set()

    @abc.abstractmethod
    def add(self, text: str, source: str, value: Any, name: str | None = None) -> None:
        """Compares what stands under an expression, and what can be reached from there."""

    @abc.abstractmethod
    def _add_attributes(self, text: str, name: str, value: Any, attributes: dict[str, Any]) -> None: ...

    def _add_code(self, text: str, name: str, value: Any) -> None:
        if isinstance(value, functools.partial):
            self._add_partial(text, name, value)
        elif isinstance(value, types.FunctionType):
            self._add_function(text, name, value)
        else:
            self._add_class(text, name, value)

    def _add_library_or_module(self, text: str, source: str, value: types.ModuleType) -> None:
        """Follows a module: of a library's only plain values, such as `math.pi`."""
        self.test(text, f"{source} is {self.name(value)}")
        if id(value) in self._walked:
            return
        self._walked.add(id(value))
        held = self.name(vars(value))
        is_followed = not is_library_module(value.__name__)
        if is_followed:
            self.add(type(value).__name__, f"type({self.name(value)})", type(value))
        for key in sorted(self._read & vars(value).keys()):
            each = vars(value)[key]
            is_library = isinstance(each, types.ModuleType) and is_library_module(each.__name__)
            if is_plain(each) or (is_followed and not is_library):
                self.add(f"{text}.{key}", f"{held}[{key!r}]", each)
        if is_followed and self._computed:
            self.add_table(text, held, vars(value))
        elif is_followed:
            self.test(text, f"len({held}) == {len(vars(value))}")
        if value is os and self._read & {"environ", "getenv"}:
            self.add("os.environ", f"{held}['environ']._data", os.environ._data)  # type: ignore[attr-defined]

    def add_table(self, text: str, source: str, table: dict[str, Any]) -> None:
        """Compares the names in a module and its plain values, any of which may be read."""
        self.test(text, f"{source}.keys() == {self.name(frozenset(table))}")
        for key, each in table.items():
            if is_plain(each) or type(each) in CONTAINERS:
                self.add(f"{text}[{key!r}]", f"{source}[{key!r}]", each)

    def _add_cached(self, text: str, name: str, value: Any) -> None:
        """Follows what a function with a cache has returned: it runs for arguments that are new, and not before."""
        function = getattr(value, "__wrapped__", None)
        if not isinstance(function, types.FunctionType) or not is_user_file(function.__code__.co_filename):
            return
        kept = _kept(value)
        self.test(text, f"[*map(id, {self.name(_kept)}({name}))] == {self.name([*map(id, kept)])}")
        self.name(kept)  # which keeps them, and so their identities
        for each in kept:
            if not is_plain(each):
                self.add(f"a result of {text}", self.name(each), each)

    def _add_bound(self, text: str, source: str, value: Any) -> None:
        """Follows a method that is stored: it is another object each time, for the same function and instance."""
        owner = value.__self__
        if isinstance(value, types.MethodType):
            self.test(text, f"{source}.__func__ is {self.name(value.__func__)}")
        elif owner is None or isinstance(owner, types.ModuleType | type) or "pybind11_" in type(owner).__name__:
            self.test(text, f"{source} is {self.name(value)}")
            return
        self.test(text, f"{source}.__self__ is {self.name(owner)}")
        self.add(text, self.name(owner), owner)

    def _add_partial(self, text: str, name: str, value: Any) -> None:
        # A captured step does not tell its plates how many datapoints they have, and keeps the scales of its sites.
        if isinstance(value, Sharded):
            for plate, shard in value.plates.items():
                self.compare(f"the size of plate {plate!r}", f"{name}.plates[{plate!r}].size", shard.size)
                source = f"{name}.plates[{plate!r}].num_shards"
                self.compare(f"the number of shards of plate {plate!r}", source, shard.num_shards)
            self.compare("the weight of a rank's loss", f"{name}.current_weight()", value.current_weight())
        self.add(text, f"{name}.func", value.func)
        self.test(text, f"[*{name}.keywords] == {self.name([*value.keywords])}")
        for index, each in enumerate(value.args):
            self.add(f"{text}'s argument", f"{name}.args[{index}]", each)
        for key, each in value.keywords.items():
            self.add(f"{text}'s argument {key}", f"{name}.keywords[{key!r}]", each)

    def _add_function(self, text: str, name: str, value: types.FunctionType) -> None:
        """Follows a function: its code is watched if it is the user's and runs, and read by nobody else."""
        self.test(text, f"{name}.__code__ is {self.name(value.__code__)}")
        self._add_defaults(text, value)
        self._add_attributes(text, name, value, vars(value))
        if value is os.getenv:
            self.add("os.environ", f"{self.name(os)}.environ._data", os.environ._data)  # type: ignore[attr-defined]
        if not is_user_file(value.__code__.co_filename) and value.__closure__:
            for key, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True):
                self.add(key, f"{self.name(cell)}.cell_contents", content(cell))

    def _add_class(self, text: str, name: str, value: type) -> None:
        if not is_library_module(type(value).__module__):
            self.add(type(value).__name__, f"type({name})", type(value))
        for each in value.__mro__:
            if is_library_module(each.__module__):
                continue
            members = {key: member for key, member in vars(each).items() if isinstance(member, _MEMBERS)}
            source = self.attributes(text, self.name(each), each)
            self.test(text, f"[*map({source}.get, {self.name((*members,))})] == {self.name([*members.values()])}")
            self.test(text, f"len({source}) == {len(vars(each))}")
            for key, member in members.items():
                self._add_defaults(f"{text}.{key}", getattr(member, "__func__", getattr(member, "fget", member)))
            for key in sorted(vars(each).keys() & self._read - members.keys()):
                if not isinstance(vars(each)[key], FIXED):
                    self.add(f"{text}.{key}", f"{name}.{key}", getattr(value, key))

    def _add_defaults(self, text: str, function: Any) -> None:
        for key in ("__defaults__", "__kwdefaults__"):
            if getattr(function, key, None) is not None:
                self.add(f"{text}'s default", f"{self.name(function)}.{key}", getattr(function, key))


def _kept(cached: Any) -> list[Any]:
    """Returns the arguments and results that a function with a cache keeps, which the garbage collector alone sees."""
    kept = itertools.takewhile(lambda each: each is not cached.__wrapped__, gc.get_referents(cached))
    flat = itertools.chain.from_iterable(each.values() if isinstance(each, dict) else (each,) for each in kept)
    return [each for each in flat if not isinstance(each, type) and type(each).__module__ != "functools"]


@functools.cache
def is_library_module(module: str) -> bool:
    """Returns whether a module is no code that is watched; torch's layers are."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return False
    return module in sys.builtin_module_names or (file is not None and not is_user_file(file))

"""What can be reached from an object by code that is named: tests that compare it with what was there before."""

from __future__ import annotations

import abc
import collections
import datetime
import decimal
import enum
import fractions
import functools
import gc
import itertools
import os
import pathlib
import random
import re
import sys
import types
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Generic

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Transform

from distopt.infer.capture.comparisons import Comparisons, is_plain, same_plain_items
from distopt.infer.capture.watch import Names, content, is_user_file
from distopt.infer.sharded_plate import Sharded

MAX_TESTS = 4000
"""Values that are compared before each step; a model that may read more stays eager."""

GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, torch.Generator)
GLOBAL_GENERATORS = (random._inst, np.random.mtrand._rand, torch.default_generator)

# Objects whose contents never change.
_FIXED = (
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
_CACHED = type(functools.cache(len))
_MEMBERS = (types.FunctionType, property, classmethod, staticmethod)
_CONTAINERS = (
    *(dict, collections.OrderedDict, collections.defaultdict, types.MappingProxyType),
    *(list, tuple, set, frozenset, collections.deque),
)
_OF_MODULES = frozenset(vars(nn.Module()))
_BASES = (object, nn.Module, pyro.nn.PyroModule, Generic, types.SimpleNamespace, *_CONTAINERS)


class ReachableValues(Comparisons):
    """Tests of values that code may read, beginning at given objects: as Python expressions over named objects.

    Args:
        named: What the functions of the code name.
        all_attributes: Whether attributes count that none of them names.
    """

    def __init__(self, named: Sequence[Names], *, all_attributes: bool = False) -> None:
        super().__init__()
        self._read = frozenset().union(*(each.attributes for each in named))
        self._used = frozenset().union(*(each.used for each in named))
        self._counted = frozenset().union(*(each.counted for each in named))
        self._whole = frozenset().union(*(each.whole for each in named))
        self._computed = all_attributes or any(each.computed for each in named)
        self._walked: set[int] = set()

    def add(self, text: str, source: str, value: Any, name: str | None = None) -> None:
        """Compares what stands under an expression, and what can be reached from there.

        Nothing of the user's may run here: properties and methods are watched as functions of their own.

        Args:
            text: The expression, as the user would write it.
            source: The expression.
            value: What it yields now.
            name: The name under which the watched code alone reads it, if there is one.
        """
        is_measured = name is not None and name not in self._used and not self._computed
        is_counted = name is not None and name not in self._counted and not self._computed
        if len(self.tests) > MAX_TESTS:
            self.refuse(f"the model may read more than {MAX_TESTS:,} plain values")
        elif is_measured and isinstance(value, np.ndarray):
            self.test(text, f"({source}.shape, {source}.dtype) == {self.name((value.shape, value.dtype))}")
        elif is_counted and type(value) in _CONTAINERS:
            self.test(text, f"len({source}) == {len(value)}")
        elif isinstance(value, tuple) and hasattr(value, "_fields") and self._loads_attributes_alone(name):
            self.test(text, f"{source} is {self.name(value)}")
            fields = {key: getattr(value, key) for key in self._read.intersection(value._fields)}
            self._add_attributes(text, self.name(value), value, fields, watched=True)
        elif is_plain(value) or (isinstance(value, np.generic) and not isinstance(value, np.void)):
            self.compare(text, source, value)
            if hasattr(value, "__dict__"):  # of a class of the user's
                self._add_read(text, self.name(value), value)
        elif isinstance(value, types.ModuleType):
            self._add_library_or_module(text, source, value)
        elif isinstance(value, types.MethodType | types.BuiltinMethodType):
            self._add_bound(text, source, value)
        else:
            if source != self.name(value):
                self.test(text, f"{source} is {self.name(value)}")
            if id(value) not in self._walked:
                self._walked.add(id(value))
                self._add_contents(text, source, value)

    def _loads_attributes_alone(self, name: str | None) -> bool:
        return name is not None and name not in self._whole and not self._computed

    def _add_contents(self, text: str, source: str, value: Any) -> None:
        name = self.name(value)
        if isinstance(value, _FIXED) or any(value is each for each in GLOBAL_GENERATORS):
            return
        if isinstance(value, Tensor):  # its values are read by the program, or compared by it
            self._add_read(text, name, value)
        elif isinstance(value, enum.Enum):
            self.add(f"{text}.value", f"{name}._value_", value._value_)
            self._add_read(text, name, value)
        elif isinstance(value, _CACHED):
            self._add_cached(text, name, value)
        elif isinstance(value, np.ndarray | np.void):  # a row of a structured array is a view of it
            self.compare_array(text, name, value)
            if hasattr(value, "__dict__"):  # of a class of the user's
                self._add_read(text, name, value)
        elif isinstance(value, types.FunctionType | functools.partial | type):
            self._add_code(text, name, value)
        else:
            self._add_values(text, name, value)

    def _add_values(self, text: str, name: str, value: Any) -> None:
        if isinstance(value, GENERATORS):
            self.refuse(f"{text} draws random numbers of its own")
        elif isinstance(value, nn.Module):
            self._add_layer(text, name, value)
        elif isinstance(value, dict | types.MappingProxyType | collections.abc.MappingView):
            self._add_mapping(text, name, value)
        elif isinstance(value, list | tuple | set | frozenset | collections.deque):
            self._add_items(text, name, value)
        else:
            self._add_object(text, name, value)

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
        is_followed = not _is_library(value.__name__)
        for key in sorted(self._read & vars(value).keys()):
            each = vars(value)[key]
            is_library = isinstance(each, types.ModuleType) and _is_library(each.__name__)
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
            if is_plain(each) or type(each) in _CONTAINERS:
                self.add(f"{text}[{key!r}]", f"{source}[{key!r}]", each)

    def _add_read(self, text: str, name: str, value: Any) -> None:
        """Follows those of an object's own attributes that are read."""
        self._add_attributes(text, name, value, {key: each for key, each in vars(value).items() if key in self._read})

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
        for each in value.__mro__:
            if _is_library(each.__module__):
                continue
            members = {key: member for key, member in vars(each).items() if isinstance(member, _MEMBERS)}
            source = self.attributes(text, self.name(each), each)
            self.test(text, f"[*map({source}.get, {self.name((*members,))})] == {self.name([*members.values()])}")
            self.test(text, f"len({source}) == {len(vars(each))}")
            for key, member in members.items():
                self._add_defaults(f"{text}.{key}", getattr(member, "__func__", getattr(member, "fget", member)))
            for key in sorted(vars(each).keys() & self._read - members.keys()):
                if not isinstance(vars(each)[key], _FIXED):
                    self.add(f"{text}.{key}", f"{name}.{key}", getattr(value, key))

    def _add_defaults(self, text: str, function: Any) -> None:
        for key in ("__defaults__", "__kwdefaults__"):
            if getattr(function, key, None) is not None:
                self.add(f"{text}'s default", f"{self.name(function)}.{key}", getattr(function, key))

    def _add_layer(self, text: str, name: str, value: nn.Module) -> None:
        """Follows a module of torch's or Pyro's: its flags, hooks, parameters, layers, and attributes that are read."""
        self.compare_layer(text, name, value)
        for key, each in {**value._parameters, **value._buffers}.items():
            if each is not None and vars(each):
                self._add_read(f"{text}.{key}", self.name(each), each)
        for table in ("_modules", "_pyro_samples"):
            if table in value.__dict__:
                self.add(f"{text}'s layers", f"{self.attributes(text, name, value)}[{table!r}]", vars(value)[table])

        # A guide's or process's own code reads what it has; a layer's code is watched.
        hidden = ("_pyro", "_cached_") if isinstance(value, Transform) else "_pyro"
        attributes = {
            key: each for key, each in vars(value).items() if not (key in _OF_MODULES or key.startswith(hidden))
        }
        if type(value).__module__.startswith("pyro."):
            more = {key: each for key, each in attributes.items() if is_plain(each) or _is_read_by_pyro(each)}
            self._add_attributes(text, name, value, more)
        named = attributes.keys() & {"forward", *self._read}
        self._add_attributes(text, name, value, {key: attributes[key] for key in named})
        if self._computed and not _is_library(type(value).__module__):
            self._add_attributes(text, name, value, attributes)
        self._add_class_attributes(text, name, value)

    def _add_mapping(self, text: str, name: str, value: Any) -> None:
        if isinstance(value, collections.abc.MappingView):
            self.refuse(f"{text} is a view of a dictionary, which cannot be compared from step to step")
            return
        keys = [*value]
        self.test(text, f"[*{name}] == {self.name(keys)}")
        if not all(type(key) is str for key in keys):  # 1 and True are equal
            self.test(text, f"[*map(type, {name})] == {self.name([*map(type, keys)])}")
        for key in keys:
            shown = f"{text}[{key!r}]" if is_plain(key) else text
            self.add(shown, f"{name}[{key!r}]" if type(key) is str else f"{name}[{self.name(key)}]", value[key])
        if type(value) not in _CONTAINERS:
            self._add_object(text, name, value)

    def _add_items(self, text: str, name: str, value: Any) -> None:
        items = [*value]
        if all(type(each) in (int, float, bool, str) for each in items) and not isinstance(value, set | frozenset):
            self.test(text, same_plain_items(name, value, self.name), is_value=True)
        elif isinstance(value, set | frozenset):
            # In this order, in which it is walked through.
            self.test(text, f"[*{name}] == {self.name(items)}", is_value=True)
            self.test(text, f"[*map(type, {name})] == {self.name([*map(type, items)])}", is_value=True)
            for each in items:
                if not is_plain(each):
                    self.add(text, self.name(each), each)
        elif len(items) > 64 and all(isinstance(each, Tensor) for each in items):
            self.compare_items(text, name)
        else:
            self.test(f"len({text})", f"len({name}) == {len(items)}")
            for index, each in enumerate(items):
                self.add(f"{text}[{index}]", f"{name}[{index}]", each)
        if type(value) not in _CONTAINERS:
            self._add_object(text, name, value)

    def _add_object(self, text: str, name: str, value: Any) -> None:
        """Follows the attributes of an object: those that are read, or all where a library's code may read them."""
        kind = type(value)
        if not all(_is_written_in_python(each) for each in kind.__mro__):
            self.refuse(f"{text} is a {kind.__name__}, whose contents cannot be compared from step to step")
            return
        slots = {key for each in kind.__mro__ for key in _slots(each)}
        attributes = {key: getattr(value, key) for key in sorted(slots) if hasattr(value, key)}
        if hasattr(value, "__dict__"):
            attributes |= {key: each for key, each in vars(value).items() if isinstance(key, str)}
            self.test(text, f"[*{self.attributes(text, name, value)}] == {self.name([*vars(value)])}")
        for key in sorted(slots - attributes.keys()):
            self.test(f"{text}.{key}", f"not hasattr({name}, {key!r})")

        reads_all = self._computed or any(_may_read_attributes(each) for each in kind.__mro__)
        if kind.__module__.startswith("distopt.") and not kind.__module__.startswith("distopt.examples."):
            attributes = {key: each for key, each in attributes.items() if is_plain(each)}
        if isinstance(value, Messenger):
            attributes.pop("trace", None)
        if isinstance(value, Transform):  # the last argument and result, which are used for that same argument alone
            attributes = {key: each for key, each in attributes.items() if not key.startswith("_cached_")}
        if not reads_all:
            attributes = {key: attributes[key] for key in attributes.keys() & self._read}
        self._add_attributes(text, name, value, attributes, watched=not reads_all)
        self._add_class_attributes(text, name, value)

    def _add_class_attributes(self, text: str, name: str, value: Any) -> None:
        """Follows what an object's class holds, which the object's own attributes may hide later."""
        kind = type(value)
        if _is_library(kind.__module__):
            return
        self.add(kind.__name__, f"type({name})", kind)
        for key in sorted(self._read - vars(value).keys() if hasattr(value, "__dict__") else ()):
            inherited = next((vars(each)[key] for each in kind.__mro__ if key in vars(each)), None)
            if is_plain(inherited) and inherited is not None:
                self.add(f"{text}.{key}", f"{name}.{key}", inherited)

    def _add_attributes(
        self, text: str, name: str, value: Any, attributes: dict[str, Any], *, watched: bool = False
    ) -> None:
        table = vars(value) if hasattr(value, "__dict__") else {}
        for key in sorted(attributes):
            source = f"{self.attributes(text, name, value)}[{key!r}]" if key in table else f"{name}.{key}"
            self.add(f"{text}.{key}", source, attributes[key], key if watched else None)


def _is_read_by_pyro(value: Any) -> bool:
    """Returns whether a value that is not plain is read by the library's own guides and processes, and may change."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return isinstance(value, Tensor | types.FunctionType | types.MethodType)


def _kept(cached: Any) -> list[Any]:
    """Returns the arguments and results that a function with a cache keeps, which the garbage collector alone sees."""
    kept = itertools.takewhile(lambda each: each is not cached.__wrapped__, gc.get_referents(cached))
    flat = itertools.chain.from_iterable(each.values() if isinstance(each, dict) else (each,) for each in kept)
    return [each for each in flat if not isinstance(each, type) and type(each).__module__ != "functools"]


@functools.cache
def _is_library(module: str) -> bool:
    """Returns whether a module is no code that is watched; torch's layers are."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__":
        return False
    return module in sys.builtin_module_names or (file is not None and not is_user_file(file))


def _may_read_attributes(kind: type) -> bool:
    """Returns whether a library's class may read attributes of a subclass's instances under names of its own."""
    if kind in _BASES or kind is abc.ABC or kind.__module__.startswith("distopt."):
        return False
    return _is_library(kind.__module__)


def _is_written_in_python(kind: type) -> bool:
    """Returns whether instances hold nothing but attributes, beyond what they inherit: no memory of C's."""
    if kind in _BASES or kind.__base__ is None:
        return True
    pointers = len([*_slots(kind)]) + sum(name in vars(kind) for name in ("__weakref__", "__dict__"))
    return kind.__basicsize__ <= kind.__base__.__basicsize__ + 8 * pointers


def _slots(kind: type) -> Iterator[str]:
    slots = vars(kind).get("__slots__", ())
    for name in (slots,) if isinstance(slots, str) else slots:
        if name not in ("__dict__", "__weakref__"):
            yield f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name

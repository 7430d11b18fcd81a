"""What can be reached from an object by code that is named: tests that compare it with what was there before."""

from __future__ import annotations

import abc
import collections
import enum
import functools
import random
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Generic

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Transform

from distopt.infer.capture.comparisons import is_fixed, is_plain, same_plain_items
from distopt.infer.capture.reachable_code import CONTAINERS, FIXED, ReachableCode, is_library_module
from distopt.infer.capture.watch import Names

MAX_TESTS = 4000
"""Values that are compared before each step; a model that may read more stays eager."""

GENERATORS = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, torch.Generator)
GLOBAL_GENERATORS = (random._inst, np.random.mtrand._rand, torch.default_generator)

_CACHED = type(functools.cache(len))
_OF_MODULES = frozenset(vars(nn.Module()))
_BASES = (object, nn.Module, pyro.nn.PyroModule, Generic, types.SimpleNamespace, *CONTAINERS)


class ReachableValues(ReachableCode):
    """Tests of values that code may read, beginning at given objects: as Python expressions over named objects.

    Args:
        named: What the functions of the code name.
        all_attributes: Whether attributes count that none of them names.
    """

    def __init__(self, named: Sequence[Names], *, all_attributes: bool = False) -> None:
        computed = all_attributes or any(each.computed for each in named)
        super().__init__(frozenset().union(*(each.attributes for each in named)), computed=computed)
        self._used = frozenset().union(*(each.used for each in named))
        self._counted = frozenset().union(*(each.counted for each in named))
        self._whole = frozenset().union(*(each.whole for each in named))

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
        elif is_counted and type(value) in CONTAINERS:
            self.test(text, f"len({source}) == {len(value)}")
        elif isinstance(value, tuple) and hasattr(value, "_fields") and self._loads_attributes_alone(name):
            self.test(text, f"{source} is {self.name(value)}")
            fields = {key: getattr(value, key) for key in self._read.intersection(value._fields)}
            self._add_attributes(text, self.name(value), value, fields, watched=True)
        elif is_plain(value) or (isinstance(value, np.generic) and not isinstance(value, np.void)):
            self.compare(text, source, value)
            if not is_fixed(value):
                self._add_subclass(text, self.name(value), value)
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

    def _add_subclass(self, text: str, name: str, value: Any) -> None:
        """Follows what a number or string of a class of the user's has besides its value."""
        if id(value) in self._walked:
            return
        self._walked.add(id(value))
        slots = {key for each in type(value).__mro__ for key in _slots(each) if hasattr(value, key)}
        keys = slots | (vars(value).keys() if hasattr(value, "__dict__") else set())
        self._add_attributes(text, name, value, {key: getattr(value, key) for key in keys & self._read})
        self._add_class_attributes(text, name, value)

    def _loads_attributes_alone(self, name: str | None) -> bool:
        return name is not None and name not in self._whole and not self._computed

    def _add_contents(self, text: str, source: str, value: Any) -> None:
        name = self.name(value)
        if isinstance(value, FIXED) or any(value is each for each in GLOBAL_GENERATORS):
            return
        self.test(text, f"type({name}) is {self.name(type(value))}")
        if isinstance(value, Tensor):  # its values are read by the program, or compared by it
            self._add_read(text, name, value)
        elif isinstance(value, enum.Enum):
            self.add(f"{text}.value", f"{name}._value_", value._value_)
            self._add_read(text, name, value)
            self._add_class_attributes(text, name, value)
        elif isinstance(value, _CACHED):
            self._add_cached(text, name, value)
        elif isinstance(value, weakref.ReferenceType):
            self.add(f"{text}()", f"{name}()", value())
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
        elif isinstance(value, torch.jit.ScriptModule):
            self.refuse(f"{text} is a module of torch.jit, whose contents cannot be compared from step to step")
        elif isinstance(value, nn.Module):
            self._add_layer(text, name, value)
        elif isinstance(value, dict | types.MappingProxyType | collections.abc.MappingView):
            self._add_mapping(text, name, value)
        elif isinstance(value, list | tuple | set | frozenset | collections.deque):
            self._add_items(text, name, value)
        else:
            self._add_object(text, name, value)

    def _add_read(self, text: str, name: str, value: Any) -> None:
        """Follows those of an object's own attributes that are read."""
        self._add_attributes(text, name, value, {key: each for key, each in vars(value).items() if key in self._read})

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
        slots = {key for each in type(value).__mro__ for key in _slots(each) if hasattr(value, key)}
        attributes |= {key: getattr(value, key) for key in slots}
        if type(value).__module__.startswith("pyro."):
            more = {key: each for key, each in attributes.items() if is_plain(each) or _is_read_by_pyro(each)}
            self._add_attributes(text, name, value, more)
        named = attributes.keys() & {"forward", *self._read}
        self._add_attributes(text, name, value, {key: attributes[key] for key in named})
        if self._computed and not is_library_module(type(value).__module__):
            self._add_attributes(text, name, value, attributes)
        self._add_class_attributes(text, name, value)

    def _add_mapping(self, text: str, name: str, value: Any) -> None:
        if isinstance(value, collections.abc.MappingView):
            self.refuse(f"{text} is a view of a dictionary, which cannot be compared from step to step")
            return
        keys = [*value]
        self.test(text, f"[*{name}] == {self.name(keys)}")
        self.test(text, f"[*map(type, {name})] == {self.name([*map(type, keys)])}")  # 1 and True are equal
        self._add_members(text, name, keys)
        if isinstance(value, collections.defaultdict):
            self.add(f"{text}.default_factory", f"{name}.default_factory", value.default_factory)
        for key in keys:
            shown = f"{text}[{key!r}]" if is_plain(key) else text
            self.add(shown, f"{name}[{key!r}]" if type(key) is str else f"{name}[{self.name(key)}]", value[key])
        if type(value) not in CONTAINERS or type(value) is collections.OrderedDict:  # on which attributes may be set
            self._add_object(text, name, value)

    def _add_members(self, text: str, name: str, members: list[Any]) -> None:
        """Follows the keys of a dictionary, or what is in a set, where these may change or be equal to others."""
        others = [each for each in members if not (is_plain(each) and is_fixed(each))]
        if others:
            self.compare_items(text, name)
        for each in others:
            self.add(f"a key of {text}", self.name(each), each)

    def _add_items(self, text: str, name: str, value: Any) -> None:
        items = [*value]
        if all(type(each) in (int, float, bool, str) for each in items) and not isinstance(value, set | frozenset):
            self.test(text, same_plain_items(name, value, self.name), is_value=True)
        elif isinstance(value, set | frozenset):
            # In this order, in which it is walked through.
            self.test(text, f"[*{name}] == {self.name(items)}", is_value=True)
            self.test(text, f"[*map(type, {name})] == {self.name([*map(type, items)])}", is_value=True)
            self._add_members(text, name, items)
        elif len(items) > 64 and all(isinstance(each, Tensor) for each in items):
            self.compare_items(text, name)
        else:
            self.test(f"len({text})", f"len({name}) == {len(items)}")
            for index, each in enumerate(items):
                self.add(f"{text}[{index}]", f"{name}[{index}]", each)
        if type(value) not in CONTAINERS:
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
        if is_library_module(kind.__module__):
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


def _may_read_attributes(kind: type) -> bool:
    """Returns whether a library's class may read attributes of a subclass's instances under names of its own."""
    if kind in _BASES or kind is abc.ABC or kind.__module__.startswith("distopt."):
        return False
    return is_library_module(kind.__module__)


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

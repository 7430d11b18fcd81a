"""Tests, as Python expressions over named objects, that values are what they were."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from distopt.infer.capture.watch import PLAIN

MAX_COMPARED_BYTES = 1 << 18
"""Arrays of NumPy up to this size are compared, at about 10 GB/s."""

_TABLES_OF_LAYER = (
    *("_parameters", "_buffers"),
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
)


class Comparisons:
    """Tests of values, each an expression, over objects that live as long as they do.

    Attributes:
        tests: By expression, what it compares, and whether that is a value.
        environment: The objects that the expressions name.
        refusal: Why something may be read that cannot be compared; None where all can be.
    """

    def __init__(self) -> None:
        self.tests: dict[str, tuple[str, bool]] = {}
        self.environment: dict[str, Any] = {each.__name__: each for each in (all, any, id, len, map, type)}
        self.environment["is_"] = operator.is_
        self.refusal: str | None = None
        self._names: dict[int, str] = {}
        self._attributes: dict[int, str] = {}

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._names

    def name(self, value: Any) -> str:
        """Returns the name under which the tests know an object, which lives as long as they do."""
        if id(value) not in self._names:
            name = self._names[id(value)] = f"r{len(self._names)}"
            self.environment[name] = value
        return self._names[id(value)]

    def attributes(self, text: str, name: str, value: Any) -> str:
        """Returns an expression for the dictionary of an object's own attributes, a look into which is quick."""
        if id(value) not in self._attributes:
            table = vars(value)
            is_kept = vars(value) is table
            if is_kept:
                self.test(text, f"{name}.__dict__ is {self.name(table)}")
            # Of a class there is another view of the same dictionary each time.
            is_named = is_kept or isinstance(value, type)
            self._attributes[id(value)] = self.name(table) if is_named else f"{name}.__dict__"
        return self._attributes[id(value)]

    def test(self, text: str, expression: str, is_value: bool = False) -> None:
        """Adds a test, and what a message says of it."""
        self.tests.setdefault(expression, (text, is_value))

    def compare(self, text: str, source: str, value: Any) -> None:
        """Compares a plain value: 1, 1.0 and True are equal and make tensors of other types, as are 0.0 and -0.0."""
        if value is None or isinstance(value, bool):
            self.test(text, f"{source} is {value}", is_value=True)
            return
        # As `repr` shows them where equal values differ: 0.0 and -0.0, also within a tuple or a complex number.
        is_shown = isinstance(value, tuple | frozenset | complex | np.complexfloating) or (
            value == 0 and type(value) is not int
        )
        # Most often it is the same object, and what is of Python's own types does not change.
        then, kind = self.name(value), self.name(type(value))
        same, now = (f"(v := {source}) is {then} or ", "v") if is_fixed(value) else ("", f"(v := {source})")
        equal = f"repr({now}) == {self.name(repr(value))}" if is_shown else f"{now} == {then}"
        self.test(text, f"{same}{equal} and type(v) is {kind}", is_value=True)

    def compare_items(self, text: str, source: str) -> None:
        """Compares what an expression yields by identity, in one test."""
        items = tuple(eval(source, self.environment))
        self.name(items)  # which keeps them, and so their identities
        self.test(text, f"[*map(id, {source})] == {self.name([*map(id, items)])}" if items else f"not {source}")

    def compare_array(self, text: str, name: str, value: Any) -> None:
        """Compares an array of NumPy, of which there may be 256 KiB."""
        if value.dtype.hasobject:
            self.refuse(f"{text} is an array of objects, which cannot be compared from step to step")
        elif value.nbytes > MAX_COMPARED_BYTES:
            self.refuse(
                f"{text} is an array of NumPy of more than {MAX_COMPARED_BYTES >> 10} KiB, too many to compare before "
                "each step (a torch.Tensor need not be compared)"
            )
        else:
            layout = f"({name}.shape, {name}.dtype) == {self.name((value.shape, value.dtype))}"
            self.test(text, f"{layout} and {name}.tobytes() == {self.name(value.tobytes())}", is_value=True)

    def compare_layer(self, text: str, name: str, value: nn.Module) -> None:
        """Compares a layer's flags, hooks, and the number of its attributes; parameters and buffers by identity."""
        held = self.attributes(text, name, value)
        flag = f"{held}['training']" if "training" in vars(value) else f"{name}.training"  # a script's is a property
        self.compare(f"{text}.training", flag, value.training)
        filled = [table for table in _TABLES_OF_LAYER if getattr(value, table)]
        for table in filled:
            items = f"{held}[{table!r}]"
            self.test(f"{text}'s parameters or hooks", f"[*{items}] == {self.name([*getattr(value, table)])}")
            self.compare_items(f"{text}'s parameters or hooks", f"{items}.values()")

        # Those without items in one test: they are the same as then, or equal to them, and these are still empty.
        empty = [table for table in _TABLES_OF_LAYER if table not in filled]
        now, then = "".join(f"{held}[{table!r}], " for table in empty), self.name((*map(vars(value).get, empty),))
        self.test(f"{text}'s parameters or hooks", f"({now}) == {then} and not any({then})")
        self.test(text, f"len({held}) == {len(vars(value))}")

    def refuse(self, reason: str) -> None:
        """Notes what cannot be compared; the first reason counts."""
        if self.refusal is None:
            self.refusal = reason


def same_plain_items(source: str, value: Any, name_of: Callable[[Any], str]) -> str:
    """Returns the expression that compares numbers and strings; equal strings are most often identical: 3 ns each."""
    items = [*value]
    listed = source if type(value) is list else f"[*{source}]"
    if all(type(each) is str for each in items):
        return f"{listed} == {name_of(items)}"
    if any(each != each for each in items):
        return f"len({source}) == {len(items)} and all(map(is_, {source}, {name_of(items)}))"
    if any(each == 0 for each in items):  # 0.0 and -0.0 are equal
        return f"repr({source}) == {name_of(repr(value))}"
    return f"{listed} == {name_of(items)} and [*map(type, {source})] == {name_of([*map(type, items)])}"


def is_plain(value: Any) -> bool:
    """Returns whether a value is compared by value: numbers, strings and the like, and tuples and slices of them."""
    if isinstance(value, tuple | frozenset):
        return type(value) in (tuple, frozenset, torch.Size) and all(
            is_plain(each) and is_fixed(each) for each in value
        )
    if isinstance(value, slice):
        return all(is_plain(each) and is_fixed(each) for each in (value.start, value.stop, value.step))
    # NaN differs from itself, so it can be no assumption.
    return isinstance(value, PLAIN) and value == value


def is_fixed(value: Any) -> bool:
    """Returns whether a plain value is of one of the plain types themselves, so that nothing can be set on it."""
    of_numpy = isinstance(value, np.generic) and type(value).__module__ == "numpy"
    return of_numpy or type(value) in (*PLAIN, tuple, frozenset)

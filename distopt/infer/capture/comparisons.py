"""Tests, as Python expressions over named objects, that values are what they were."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distopt.infer.capture.watch import PLAIN

MAX_COMPARED_BYTES = 1 << 18
"""Arrays of NumPy up to this size are compared, at about 10 GB/s."""


class Comparisons:
    """Tests of values, each an expression, over objects that live as long as they do.

    Attributes:
        tests: By expression, what it compares, and whether that is a value.
        environment: The objects that the expressions name.
        refusal: Why something may be read that cannot be compared; None where all can be.
    """

    def __init__(self) -> None:
        self.tests: dict[str, tuple[str, bool]] = {}
        self.environment: dict[str, Any] = {each.__name__: each for each in (all, id, len, map, type)}
        self.environment["is_"] = operator.is_
        self.refusal: str | None = None
        self._names: dict[int, str] = {}

    def __contains__(self, value: Any) -> bool:
        return id(value) in self._names

    def name(self, value: Any) -> str:
        """Returns the name under which the tests know an object, which lives as long as they do."""
        if id(value) not in self._names:
            name = self._names[id(value)] = f"r{len(self._names)}"
            self.environment[name] = value
        return self._names[id(value)]

    def test(self, text: str, expression: str, is_value: bool = False) -> None:
        """Adds a test, and what a message says of it."""
        self.tests.setdefault(expression, (text, is_value))

    def compare(self, text: str, source: str, value: Any) -> None:
        """Compares a plain value: 1, 1.0 and True are equal and make tensors of other types, as are 0.0 and -0.0."""
        if isinstance(value, tuple | frozenset) or value == 0:
            expression = f"repr({source}) == {self.name(repr(value))}"
        else:
            expression = f"(v := {source}) == {self.name(value)} and type(v) is {self.name(type(value))}"
        self.test(text, expression, is_value=True)

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
        self.compare(f"{text}.training", f"{name}.training", value.training)
        for table in ("_parameters", "_buffers"):
            self.compare_items(f"{text}'s parameters", f"{name}.__dict__[{table!r}].values()")
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        without = [table for table in hooks if not getattr(value, table)]
        for table in (each for each in hooks if each not in without):
            self.test(f"{text}'s hooks", f"[*{name}.{table}] == {self.name([*getattr(value, table)])}")
        if without:
            self.test(f"{text}'s hooks", f"not ({' or '.join(f'{name}.{table}' for table in without)})")
        self.test(text, f"len({name}.__dict__) == {len(vars(value))}")

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
    """Returns whether a value is compared by value: numbers, strings and the like, and tuples of them."""
    if isinstance(value, tuple | frozenset):
        return type(value) in (tuple, frozenset, torch.Size) and all(is_plain(each) for each in value)
    # NaN differs from itself, so it can be no assumption.
    return isinstance(value, PLAIN) and value == value

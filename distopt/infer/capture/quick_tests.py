"""Tests that C++ makes by identity in place of Python expressions, some nanoseconds each.

Most of what a model reads is the same object in each step, which one look into one dictionary tells. Quick tests are
enough, and no more: where one fails, an equal value may have taken the place of another, and the expressions decide.
"""

from __future__ import annotations

import ast
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, TypeAlias

from distopt.infer.capture.program import compiled

# As in _quick_tests.cpp.
ITEM, SIZE, KEYS, VALUES, ELEMENTS, ATTRIBUTES, TYPE, ABSENT = range(8)

_TABLES = (dict, OrderedDict, MappingProxyType)

QuickTest: TypeAlias = tuple[int, Any, Any, Any]
"""What it compares, the object that it looks at, and one or two that it expects."""

all_hold: Callable[[tuple[Any, ...]], bool] | None = None if compiled is None else compiled.all_hold
"""Returns whether all tests of a flat tuple of them hold; None where the extension is not built."""


def separate(expressions: Iterable[str], named: dict[str, Any]) -> tuple[tuple[Any, ...], list[str]]:
    """Returns the quick tests for expressions, flat, and the expressions for which there are none.

    Args:
        expressions: They hold now.
        named: The objects that they name.
    """
    quick: list[Any] = []
    rest: list[str] = []
    for expression in expressions:
        tests = [] if all_hold is None else _quick_tests(ast.parse(expression, mode="eval").body, named)
        flat = tuple(each for test in tests for each in test)
        # One that fails now, as of an object with a dictionary of its own making, would fail in each step.
        if flat and all_hold is not None and all_hold(flat):
            quick += flat
        else:
            rest.append(expression)
    return tuple(quick), rest


def _quick_tests(test: ast.expr, named: dict[str, Any]) -> list[QuickTest]:
    """Returns quick tests that are enough for an expression; none where there are none."""
    match test:
        case ast.Compare(ast.Subscript(ast.Name(table), ast.Constant(key)), [ast.Is()], [value]):
            return _item(named[table], key, _object(value, named))
        case ast.BoolOp(ast.Or(), [ast.Compare(ast.NamedExpr(_, source), [ast.Is()], [ast.Name(value)]), *_]):
            return _quick_tests(ast.Compare(source, [ast.Is()], [ast.Name(value)]), named)
        case ast.Compare(ast.Attribute(ast.Name(name), "__dict__"), [ast.Is()], [ast.Name(table)]):
            return [(ATTRIBUTES, named[name], named[table], None)]
        case ast.Compare(ast.Call(ast.Name("type"), [ast.Name(name)]), [ast.Is()], [ast.Name(kind)]):
            return [(TYPE, named[name], named[kind], None)]
        case ast.Call(ast.Attribute(ast.Call(ast.Attribute(ast.Name(table), "keys")), "isdisjoint"), [ast.Name(names)]):
            return [(ABSENT, named[table], tuple(named[names]), None)] if type(named[table]) is dict else []
        case ast.BoolOp(ast.And(), [ast.Compare(ast.Tuple(sources), [ast.Eq()], [ast.Name(tables)]), *_]):
            return _empty_tables(sources, named[tables], named)
        case ast.BoolOp(ast.And(), [ast.Compare() as first, ast.Compare(ast.List([ast.Starred(ast.Call())]))]):
            return _elements_or_values(first, named)  # and their types
        case ast.Compare(_, [ast.Eq()], [_]):
            return _elements_or_values(test, named)
    return []


def _elements_or_values(test: ast.Compare, named: dict[str, Any]) -> list[QuickTest]:
    """Returns quick tests for the size, keys, values, or elements of a container."""
    match test.left, test.comparators[0]:
        case ast.Call(ast.Name("len"), [ast.Name(table)]), ast.Constant(size):
            return [(SIZE, named[table], size, None)] if type(named[table]) in _TABLES else []
        case ast.Name(items), ast.Name(expected) if type(named[items]) is list:
            return [(ELEMENTS, named[items], tuple(named[expected]), None)]
        case ast.List([ast.Starred(ast.Name(table))]), ast.Name(expected):
            if type(named[table]) is dict:
                return [(KEYS, named[table], tuple(named[table]), None)]
            return [(ELEMENTS, named[table], tuple(named[expected]), None)] if type(named[table]) is list else []
        case ast.List([ast.Starred(ast.Subscript(ast.Name(owner), ast.Constant(key)))]), ast.Name():
            table = named[owner][key]
            return [*_item(named[owner], key, table), (KEYS, table, tuple(table), None)] if type(table) is dict else []
        case ast.List([ast.Starred(ast.Call(ast.Name("map"), [function, source]))]), ast.Name(expected):
            return _mapped(function, source, named[expected], named)
    return []


def _mapped(function: ast.expr, source: ast.expr, expected: list[Any], named: dict[str, Any]) -> list[QuickTest]:
    """Returns quick tests for several items of a table, or for all of its values."""
    match function, source:
        case ast.Attribute(ast.Name(table), "get"), ast.Name(keys):
            pairs = zip(named[keys], expected, strict=True)
            return [test for key, value in pairs for test in _item(named[table], key, value)]
        case ast.Name("type"), ast.Name(table) if type(named[table]) is dict:
            return [(KEYS, named[table], tuple(named[table]), None)]  # the same keys have the same types
        case (
            ast.Name("id"),
            ast.Call(ast.Attribute(ast.Subscript(ast.Name(owner), ast.Constant(key)), "values")),
        ) if type(named[owner][key]) is dict:
            table = named[owner][key]
            return [*_item(named[owner], key, table), (VALUES, table, tuple(table.values()), None)]
    return []


def _empty_tables(sources: list[ast.expr], tables: tuple[Any, ...], named: dict[str, Any]) -> list[QuickTest]:
    tests = []
    for source, table in zip(sources, tables, strict=True):
        match source:
            case ast.Subscript(ast.Name(owner), ast.Constant(key)) if type(table) in _TABLES:
                tests += [*_item(named[owner], key, table), (SIZE, table, 0, None)]
            case _:
                return []
    return tests


def _item(table: Any, key: Any, value: Any) -> list[QuickTest]:
    if type(table) not in _TABLES or type(key) is not str:
        return []
    return [(ITEM, table, sys.intern(key), value)]


def _object(value: ast.expr, named: dict[str, Any]) -> Any:
    """Returns what stands for an object in a test: a name, or one of Python's constants."""
    assert isinstance(value, ast.Name | ast.Constant)
    return named[value.id] if isinstance(value, ast.Name) else value.value

"""Quick tests hold exactly while objects are the same, and never where the expression that they stand for does not."""

import collections
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from distopt.infer.capture import quick_tests
from distopt.infer.capture.comparisons import Comparisons

pytestmark = pytest.mark.skipif(quick_tests.all_hold is None, reason="the extension is not built")


class Settings:
    scale = 1.0


def quick_of(expression, named):
    """Returns the quick tests of one expression, which must hold and have some."""
    quick, rest = quick_tests.separate([expression], named)
    assert quick and not rest
    assert quick_tests.all_hold(quick)
    return quick


def dictionary():
    return {"a": object(), "b": object()}


CASES = {
    "item": ("table['a'] is value", lambda table: table.__setitem__("a", object())),
    "item that is gone": ("table['a'] is value", lambda table: table.pop("a")),
    "plain value": ("(v := table['a']) is value or v == value", lambda table: table.__setitem__("a", 2.0)),
    "size": ("len(table) == 2", lambda table: table.pop("b")),
    "keys": ("[*table] == keys", lambda table: table.__setitem__("c", 1)),
    "order of keys": ("[*table] == keys", lambda table: table.__setitem__("a", table.pop("a"))),
    "several items": ("[*map(table.get, keys)] == values", lambda table: table.__setitem__("b", 1)),
    "no such names": ("table.keys().isdisjoint(absent)", lambda table: table.__setitem__("c", 1)),
    "values": ("[*map(id, outer['table'].values())] == ids", lambda table: table.__setitem__("b", 1)),
    "number of values": ("[*map(id, outer['table'].values())] == ids", lambda table: table.__setitem__("c", 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_of_a_dictionary(name):
    expression, change = CASES[name]
    table = dictionary()
    named = {
        **{"table": table, "outer": {"table": table}, "value": table["a"], "keys": [*table]},
        **{"values": [*table.values()], "absent": {"c", "d"}, "ids": [*map(id, table.values())]},
    }
    quick = quick_of(expression, named)
    change(table)
    assert not quick_tests.all_hold(quick)


def test_of_an_object():
    value = Settings()
    quick = quick_of("value.__dict__ is table", {"value": value, "table": vars(value)})
    value.__dict__ = {}
    assert not quick_tests.all_hold(quick)

    quick = quick_of("type(value) is kind", {"value": value, "kind": Settings, "type": type})
    value.__class__ = type("Other", (Settings,), {})
    assert not quick_tests.all_hold(quick)


def test_of_a_class():
    kind = type("Kind", (), {"scale": 1.0})
    quick = quick_of("table['scale'] is value", {"table": vars(kind), "value": kind.scale})
    kind.scale = 0.5
    assert not quick_tests.all_hold(quick)
    del kind.scale
    assert not quick_tests.all_hold(quick)


def test_of_a_list():
    numbers = [1.0, 2.0]
    quick = quick_of("numbers == then", {"numbers": numbers, "then": [*numbers]})
    numbers.append(3.0)
    assert not quick_tests.all_hold(quick)
    numbers[:] = [1.0, 0.5]
    assert not quick_tests.all_hold(quick)


def test_of_a_layer():
    layer = nn.Linear(2, 3)
    for change in (
        lambda: layer.eval(),
        lambda: layer.register_buffer("scale", torch.ones(())),
        lambda: setattr(layer, "weight", nn.Parameter(torch.ones(3, 2))),
        lambda: layer.register_forward_pre_hook(lambda *_: None),
        lambda: setattr(layer, "_forward_hooks", collections.OrderedDict()),
        lambda: setattr(layer, "__dict__", {**vars(layer)}),
    ):
        comparisons = Comparisons()
        comparisons.compare_layer("layer", comparisons.name(layer), layer)
        quick, _ = quick_tests.separate(comparisons.tests, comparisons.environment)
        assert quick_tests.all_hold(quick)
        change()
        assert not quick_tests.all_hold(quick)


@pytest.mark.parametrize(
    "expression",
    [
        *("function() is value", "value.scale is number", "[*letters] == keys", "(v := function()) is value or v == 1"),
        *("mapping['a'] is value", "len(letters) == 2", "repr(value) == 'x'", "letters.isdisjoint(keys)"),
    ],
)
def test_what_runs_code_or_is_no_dictionary_is_left_to_python(expression):
    class Mapping(dict):
        def __getitem__(self, key):
            return self.get(key)

    value = types.SimpleNamespace(scale=1.0)
    named = {
        **{"value": value, "number": value.scale, "function": lambda: value, "letters": {"a", "b"}},
        **{"keys": ["a", "b"], "mapping": Mapping(a=value)},
    }
    assert quick_tests.separate([expression], named) == ((), [expression])


TABLE = {}


def test_a_test_that_does_not_hold_is_left_to_python():
    class Proxied:
        __dict__ = property(lambda self: TABLE)

    named = {"value": Proxied(), "table": TABLE}
    assert quick_tests.separate(["value.__dict__ is table"], named) == ((), ["value.__dict__ is table"])


def test_tests_keep_nothing_alive_in_a_cycle():
    value = Settings()
    value.quick = quick_of("value.__dict__ is table", {"value": value, "table": vars(value)})
    alive = weakref.ref(value)
    del value
    gc.collect()
    assert alive() is None

"""Containers whose contents change between steps."""

from __future__ import annotations

import collections
import copy
import types
from typing import NamedTuple

import torch

from tests.infer.capture.changes import Prior, Settings, Tree, case, model_of

NESTED = {"a": {"b": [1.0, {"c": 1.0}]}}


@case
def loop_over_objects():
    priors = [Prior(), Prior()]
    return model_of(lambda: sum(each.scale for each in priors)), lambda: setattr(priors[1], "scale", 0.5)


@case
def nested_dictionary():
    nested = copy.deepcopy(NESTED)

    def read():
        total = 0.0
        for value in nested["a"].values():
            total += value[0]
        return total

    return model_of(read), lambda: nested["a"]["b"].__setitem__(0, 0.5)


@case
def deeply_nested():
    nested = copy.deepcopy(NESTED)

    def read():
        local = nested
        return local["a"]["b"][1]["c"]

    return model_of(read), lambda: nested["a"]["b"][1].update(c=0.5)


@case
def recursion_over_a_tree():
    tree = Tree(1.0, Tree(1.0), Tree(1.0, Tree(1.0)))

    def total(node):
        return node.value + sum(total(child) for child in node.children)

    return model_of(lambda: total(tree)), lambda: setattr(tree.children[1].children[0], "value", 0.5)


@case
def cyclic_objects():
    one, other = Tree(1.0), Tree(1.0)
    one.children.append(other)
    other.children.append(one)
    return model_of(lambda: one.children[0].children[0].value + other.value), lambda: setattr(other, "value", 0.5)


@case
def long_list():
    numbers = [1.0] * 300
    return model_of(lambda: sum(numbers)), lambda: numbers.__setitem__(250, 5.0)


@case
def list_of_lists():
    numbers = [[1.0, 2.0], [3.0]]
    return model_of(lambda: sum(map(sum, numbers))), lambda: numbers[1].append(2.0)


@case
def list_of_tuples():
    numbers = [(1.0, 2.0), (3.0, 4.0)]
    return model_of(lambda: sum(a for a, _ in numbers)), lambda: numbers.__setitem__(1, (5.0, 4.0))


@case
def tuple_of_lists():
    numbers = ([1.0], [2.0])
    return model_of(lambda: numbers[1][0]), lambda: numbers[1].__setitem__(0, 0.5)


@case
def set_of_numbers():
    numbers = {1.0, 2.0}

    def change():
        numbers.remove(2.0)
        numbers.add(5.0)

    return model_of(lambda: sum(numbers)), change


@case
def deque():
    numbers = collections.deque([1.0, 2.0], maxlen=2)
    return model_of(lambda: sum(numbers)), lambda: numbers.append(0.5)


@case
def ordered_dictionary():
    numbers = collections.OrderedDict(a=1.0, b=3.0)

    def read():
        (first, *_) = numbers.values()
        return first

    return model_of(read), lambda: numbers.move_to_end("a")


@case
def order_of_a_dictionary():
    numbers = {"a": 1.0, "b": 3.0}

    def change():
        numbers["a"] = numbers.pop("a")

    return model_of(lambda: [*numbers.values()][0]), change


@case
def default_dictionary():
    numbers = collections.defaultdict(lambda: 1.0)
    return model_of(lambda: numbers.get("scale", 1.0)), lambda: numbers.update(scale=0.5)


@case
def user_dictionary():
    numbers = collections.UserDict(scale=1.0)
    return model_of(lambda: numbers["scale"]), lambda: numbers.update(scale=0.5)


@case
def chained_dictionaries():
    numbers = collections.ChainMap({}, {"scale": 1.0})
    return model_of(lambda: numbers["scale"]), lambda: numbers.update(scale=0.5)


@case
def proxy_of_a_dictionary():
    numbers = {"scale": 1.0}
    proxy = types.MappingProxyType(numbers)
    return model_of(lambda: proxy["scale"]), lambda: numbers.update(scale=0.5)


@case
def dictionary_with_attributes():
    class Easy(dict):
        __getattr__ = dict.__getitem__

    numbers = Easy(scale=1.0)
    return model_of(lambda: numbers.scale), lambda: numbers.update(scale=0.5)


@case
def list_with_attributes():
    class Named(list):
        pass

    numbers = Named([1.0])
    numbers.scale = 1.0
    return model_of(lambda: numbers.scale), lambda: setattr(numbers, "scale", 0.5)


@case
def named_tuple_of_lists():
    class Pair(NamedTuple):
        first: list
        second: float

    pair = Pair([1.0], 2.0)
    return model_of(lambda: pair.first[0]), lambda: pair.first.__setitem__(0, 0.5)


@case
def integer_in_a_list():
    numbers = [1.0, 2.0]
    scale = model_of(lambda: torch.tensor(numbers[:1] + [2]).sum() / 3)
    return scale, lambda: numbers.__setitem__(0, 1)


@case
def nan_in_a_list():
    numbers = [float("nan"), 1.0]
    return model_of(lambda: numbers[1]), lambda: numbers.__setitem__(1, 0.5)


@case
def list_of_tensors():
    tensors = [torch.ones(()), torch.ones(())]
    return model_of(lambda: sum(tensors)), lambda: tensors.__setitem__(1, torch.tensor(0.5))


@case
def dictionary_of_tensors_in_a_loop():
    tensors = {"a": {"x": torch.ones(())}}

    def read():
        return sum(each["x"] for each in tensors.values())

    return model_of(read), lambda: tensors["a"].update(x=torch.tensor(0.5))


@case
def attribute_of_a_key():
    key = Settings()
    key.scale = 1.0
    table = {key: 2}
    return model_of(lambda: [*table][0].scale), lambda: setattr(key, "scale", 0.5)


@case
def attribute_within_a_key():
    inner = Settings()
    inner.scale = 1.0
    table = {(1, inner): 2}
    return model_of(lambda: [*table][0][1].scale), lambda: setattr(inner, "scale", 0.5)


@case
def key_that_is_equal_to_all():
    class Key:
        def __init__(self, scale):
            self.scale = scale

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

    table = {Key(1.0): 1}

    def change():
        table.clear()
        table[Key(0.5)] = 1

    return model_of(lambda: [*table][0].scale), change


@case
def key_of_another_class():
    class Key(str):
        pass

    table = {"a": 1.0}

    def change():
        table.clear()
        table[Key("a")] = 1.0

    return model_of(lambda: 0.5 if type([*table][0]) is Key else 1.0), change


@case
def what_a_default_dictionary_makes():
    table = collections.defaultdict(lambda: 1.0)

    def change():
        table.default_factory = lambda: 0.5

    return model_of(lambda: (table["a"], table.pop("a"))[0]), change


@case
def attribute_of_an_ordered_dictionary():
    table = collections.OrderedDict(a=1.0)
    table.scale = 1.0
    return model_of(lambda: table.scale), lambda: setattr(table, "scale", 0.5)


@case
def list_in_a_slice():
    numbers = [1.0]
    rows = slice(numbers, None)
    return model_of(lambda: rows.start[0]), lambda: numbers.__setitem__(0, 0.5)


@case
def attribute_of_a_string_in_a_tuple():
    class Name(str):
        pass

    name = Name("x")
    name.scale = 1.0
    names = (name,)
    return model_of(lambda: names[0].scale), lambda: setattr(name, "scale", 0.5)


@case
def string_that_shows_itself():
    class Name(str):
        def __repr__(self):
            return str(self.scale)

    name = Name("x")
    name.scale = 1.0
    names = (name,)
    return model_of(lambda: float(repr(names[0]))), lambda: setattr(name, "scale", 0.5)

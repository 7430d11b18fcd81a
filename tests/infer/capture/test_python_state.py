"""Models that change objects of the user's: a compiled run calls them as often as an eager one, and no step more."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer import SVI
from distopt.optim import Adam, DistributedOptimizer

NUM_STEPS = 12
calls = 0


class Counter:
    """Counts in an attribute of its class, until it has one of its own."""

    number = 0


class Slotted:
    __slots__ = ("number",)

    def __init__(self):
        self.number = 0


def count_in_a_global():
    global calls, fresh
    calls = fresh = 0
    del fresh

    def count():
        global calls, fresh
        calls += 1
        fresh = globals().get("fresh", 0) + 1
        return min(calls, fresh)

    return count


def count_in_a_closure():
    number = 0

    def count():
        nonlocal number
        number += 1
        return number

    return count


def count_in_an_attribute(owner):
    def count():
        owner.number += 1
        return owner.number

    return count


def count_in_the_class():
    class Kind:
        number = 0

    def count():
        Kind.number += 1
        return Kind.number

    return count


def count_in_a_deep_attribute():
    owner = SimpleNamespace(inner=SimpleNamespace(number=0))

    def count():
        owner.inner.number += 1
        return owner.inner.number

    return count


def count_in(container, add):
    def count():
        add(container)
        return len(container[0] if isinstance(container, tuple) else container)

    return count


def count_in_a_value():
    table = {"number": 0}

    def count():
        table["number"] += 1
        return table["number"]

    return count


def count_in_an_array():
    array = np.zeros(2)

    def count():
        array[1] += 1.0
        return float(array[1])

    return count


def count_by_a_helper():
    owner = Counter()

    def add(counter):
        counter.number += 1

    def count():
        add(owner)
        return owner.number

    return count


def count_by_an_iterator():
    numbers = iter(range(1, 1000))
    return lambda: next(numbers)


def count_by_an_iterator_of_an_object():
    owner = SimpleNamespace(numbers=iter(range(1, 1000)))
    return lambda: next(owner.numbers)


def count_by_a_generator():
    numbers = (each for each in range(1, 1000))
    return lambda: next(numbers)


def draw_by(generator, draw):
    def count():
        return 1.0 + draw(generator)

    return count


def count_and_print():
    numbers = []

    def count():
        numbers.append(None)
        print(len(numbers))
        return len(numbers)

    return count


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("number", torch.zeros(()))
        self.inner = torch.nn.Identity()
        self.inner.number = 0

    def forward(self):
        self.number = self.number + 1
        return float(self.number)

    def count_inside(self):
        self.inner.number += 1
        return self.inner.number


@dataclass(frozen=True, slots=True)
class Frozen:
    number: int = 0

    def count(self):
        object.__setattr__(self, "number", self.number + 1)
        return self.number


def count_by_two_closures_alike():
    one, other = count_in_a_closure(), count_in_a_closure()
    return lambda: 10 * one() + other()


def count_through_a_getter():
    state = SimpleNamespace(number=0)

    def get():
        return state

    def count():
        get().number += 1
        return state.number

    return count


def count_by_a_computed_name():
    owner = SimpleNamespace(number=0)

    def count():
        setattr(owner, "num" + "ber", getattr(owner, "num" + "ber") + 1)
        return owner.number

    return count


def count_in_what_is_made_late():
    table = {}

    def count():
        if "made" not in table:
            table["made"] = SimpleNamespace(number=0)
        table["made"].number += 1
        return table["made"].number

    return count


def count_and_print_each_third():
    numbers = []

    def count():
        numbers.append(None)
        if len(numbers) % 3 == 0:
            print(len(numbers))
        return len(numbers)

    return count


def take_from_a_schedule_that_ends():
    schedule = [1.0 + each for each in range(NUM_STEPS)]
    return lambda: schedule.pop(0)


CASES = {
    "a buffer": Layer,
    "an attribute of a layer": lambda: Layer().count_inside,
    "a frozen object": lambda: Frozen().count,
    "two closures": count_by_two_closures_alike,
    "a getter": count_through_a_getter,
    "a computed name": count_by_a_computed_name,
    "an object made late": count_in_what_is_made_late,
    "a print each third time": count_and_print_each_third,
    "a schedule that ends": take_from_a_schedule_that_ends,
    "a global": count_in_a_global,
    "a variable of a closure": count_in_a_closure,
    "an attribute that its class has": lambda: count_in_an_attribute(Counter()),
    "an attribute": lambda: count_in_an_attribute(SimpleNamespace(number=0)),
    "a slot": lambda: count_in_an_attribute(Slotted()),
    "an attribute of a class": count_in_the_class,
    "an attribute of an attribute": count_in_a_deep_attribute,
    "a list": lambda: count_in([], lambda each: each.append(None)),
    "a list of one list": lambda: count_in([], lambda each: each.extend([[]])),
    "a list in a tuple": lambda: count_in(([], 0), lambda each: each[0].append(None)),
    "a queue": lambda: count_in(deque(), lambda each: each.append(0)),
    "a set": lambda: count_in(set(), lambda each: each.add(len(each))),
    "a dictionary": lambda: count_in({}, lambda each: each.update({str(len(each)): 0})),
    "a value of a dictionary": count_in_a_value,
    "an array": count_in_an_array,
    "a helper": count_by_a_helper,
    "an iterator": count_by_an_iterator,
    "an iterator in an attribute": count_by_an_iterator_of_an_object,
    "a generator": count_by_a_generator,
    "a generator of NumPy's": lambda: draw_by(np.random.default_rng(0), lambda each: each.random()),
    "a generator of Python's": lambda: draw_by(random.Random(0), lambda each: each.random()),
    "a generator of torch's": lambda: draw_by(
        torch.Generator().manual_seed(0), lambda each: float(torch.rand((), generator=each))
    ),
    "a print": count_and_print,
}


def losses_of(count, capture, *, compile_from_step=None, from_step=0):
    """Returns the losses of twelve steps of a model that anneals by what `count` returns, and what it returned."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    returned = []

    def model(x):
        number = count()
        model.returned = number
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0 + number / 10))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([5]).to_event(1), obs=x)

    guide = AutoNormal(pyro.poutine.block(lambda x: pyro.sample("loc", dist.Normal(0.0, 1.0)), hide=[]))
    settings = {"capture": capture, "compile_from_step": compile_from_step}
    svi = SVI(model, guide, DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), **settings)
    losses = []
    for _ in range(NUM_STEPS):
        losses.append(svi.step(torch.ones(5)))
        returned.append(model.returned)
    return losses, returned, svi.captured


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("settings", [{"capture": "compiled"}, {"capture": "auto", "compile_from_step": 6}], ids=str)
def test_model_is_called_once_for_each_step(name, settings):
    expected, numbers, _ = losses_of(CASES[name](), "off")
    losses, returned, captured = losses_of(CASES[name](), **settings)
    assert (losses, returned) == (expected, numbers)
    assert captured.refusal is not None
    assert captured.num_captured == 0


def test_effect_that_begins_with_another_kind_of_batch_happens_once_for_each_step():
    def numbers_of(capture):
        pyro.clear_param_store()
        owner = SimpleNamespace(epoch=0)

        def model(x, is_last):
            if is_last:
                owner.epoch += 1
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0 + owner.epoch))
            pyro.sample("x", dist.Normal(loc, 1.0).expand([5]).to_event(1), obs=x)

        svi = SVI(model, AutoNormal(model), DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture=capture)
        numbers = []
        for step in range(8):
            svi.step(torch.ones(5), step % 4 == 3)
            numbers.append(owner.epoch)
        return numbers

    assert numbers_of("compiled") == numbers_of("off")


def test_object_that_cannot_be_looked_at_keeps_steps_eager():
    class Odd:
        __slots__ = ("table",)

        def __getattr__(self, name):
            return self.table[name]

    odd = Odd()
    odd.table = {"scale": 2}
    expected, _, _ = losses_of(lambda: odd.scale, "off")
    for capture in ("graph", "compiled"):
        losses, _, captured = losses_of(lambda: odd.scale, capture)
        assert losses == expected
        assert "cannot be looked at: KeyError" in captured.refusal


@pytest.mark.timeout(900)
def test_iterators_that_are_new_in_each_step_are_no_reason_to_stay_eager():
    def total(pairs):
        return sum(a * b for a, b in pairs)

    owner = SimpleNamespace(scale=2.0, unused=np.random.default_rng(0), rows=iter([1]))  # which no code names

    def scale():
        return total(zip([1.0, owner.scale], [0.5, 0.25], strict=True))

    _, _, captured = losses_of(scale, "compiled")
    assert (captured.refusal, captured.notice) == (None, None)


@pytest.mark.timeout(900)
def test_model_that_keeps_a_value_for_its_next_call_is_compiled():
    kept = {}

    def scale():
        if "scale" not in kept:
            kept["scale"] = torch.ones(()) * 0.5
        return kept["scale"]

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, scale()))
        pyro.sample("x", dist.Normal(loc, 1.0).expand([5]).to_event(1), obs=x)

    pyro.clear_param_store()
    svi = SVI(model, AutoNormal(model), DistributedOptimizer(Adam({"lr": 0.05})), Trace_ELBO(), capture="compiled")
    for _ in range(6):
        svi.step(torch.ones(5))
    assert svi.captured.refusal is None
    assert svi.captured.notice is None
    assert svi.captured.num_captured == 5

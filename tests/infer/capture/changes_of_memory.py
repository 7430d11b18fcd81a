"""Numbers in arrays and other memory, and what steps move themselves, that change between steps."""

from __future__ import annotations

import array
import collections
import contextvars
import ctypes
import enum
import itertools
import os
import random
import sys
import threading
import types

import numpy as np
import torch

from tests.infer.capture.changes import case, model_of


@case
def array_made_a_tensor():
    numbers = np.ones(3, dtype=np.float32)
    return model_of(lambda: torch.tensor(numbers).sum()), lambda: numbers.__setitem__(0, 5.0)


@case
def array_read_as_a_number():
    numbers = np.ones(3)
    return model_of(lambda: float(numbers.mean())), lambda: numbers.__setitem__(0, 5.0)


@case
def array_in_a_dictionary():
    numbers = {"a": np.ones(3)}

    def read():
        return sum(float(each.sum()) for each in numbers.values())

    return model_of(read), lambda: numbers["a"].__setitem__(0, 5.0)


@case
def array_shared_with_a_tensor():
    numbers = np.ones(3, dtype=np.float32)
    shared = torch.from_numpy(numbers)
    return model_of(lambda: shared.sum()), lambda: numbers.__setitem__(0, 5.0)


@case
def array_wrapped_in_each_step():
    numbers = np.ones(3, dtype=np.float32)
    return model_of(lambda: torch.from_numpy(numbers).sum()), lambda: numbers.__setitem__(0, 5.0)


@case
def number_of_numpy():
    holder = types.SimpleNamespace(scale=np.float32(1.0))

    def read():
        local = holder
        return float(local.scale)

    return model_of(read), lambda: setattr(holder, "scale", np.float32(0.5))


@case
def row_of_a_structured_array():
    rows = np.array([(1.0,)], dtype=[("scale", "f4")])
    row = rows[0]
    return model_of(lambda: float(row["scale"])), lambda: rows.__setitem__("scale", 0.5)


@case
def large_array():
    numbers = np.ones(200_000)
    return model_of(lambda: float(numbers[-1])), lambda: numbers.__setitem__(-1, 0.5)


@case
def array_of_the_standard_library():
    numbers = array.array("d", [1.0, 2.0])
    return model_of(lambda: numbers[0]), lambda: numbers.__setitem__(0, 0.5)


@case
def number_in_memory():
    number = ctypes.c_double(1.0)
    return model_of(lambda: number.value), lambda: setattr(number, "value", 0.5)


@case
def bytes_in_memory():
    numbers = bytearray([1, 2])
    return model_of(lambda: float(numbers[0])), lambda: numbers.__setitem__(0, 5)


@case
def view_of_memory():
    numbers = bytearray([1, 2])
    view = memoryview(numbers)
    return model_of(lambda: float(view[0])), lambda: numbers.__setitem__(0, 5)


@case
def number_of_a_context():
    variable = contextvars.ContextVar("variable", default=1.0)
    return model_of(lambda: variable.get()), lambda: variable.set(0.5)


@case
def number_of_a_thread():
    local = threading.local()
    local.scale = 1.0

    def read():
        each = local
        return each.scale

    return model_of(read), lambda: setattr(local, "scale", 0.5)


@case
def environment_variable():
    os.environ["DISTOPT_TEST_SCALE"] = "1.0"
    return model_of(lambda: float(os.environ["DISTOPT_TEST_SCALE"])), lambda: os.environ.update(DISTOPT_TEST_SCALE="2")


@case
def environment_variable_by_function():
    os.environ["DISTOPT_TEST_SCALE"] = "1.0"
    return model_of(lambda: float(os.getenv("DISTOPT_TEST_SCALE"))), lambda: os.environ.update(DISTOPT_TEST_SCALE="2")


@case
def attribute_of_a_library():
    sys.capture_scale = 1.0
    return model_of(lambda: sys.capture_scale), lambda: setattr(sys, "capture_scale", 0.5)


@case
def flag():
    event = threading.Event()
    return model_of(lambda: 1.0 if event.is_set() else 2.0), event.set


class Mode(enum.Enum):
    WARM = 1.0
    COLD = 0.5


@case
def enumeration():
    holder = types.SimpleNamespace(mode=Mode.WARM)

    def read():
        local = holder
        return local.mode.value

    return model_of(read), lambda: setattr(holder, "mode", Mode.COLD)


@case
def generator():
    def values():
        yield from [1.0] * 9
        while True:
            yield 0.5

    numbers = values()
    return model_of(lambda: next(numbers)), lambda: None


@case
def iterator():
    numbers = iter([1.0] * 9 + [0.5] * 100)
    return model_of(lambda: next(numbers)), lambda: None


@case
def cycle():
    numbers = itertools.cycle([1.0] * 7 + [0.5] * 5)
    return model_of(lambda: next(numbers)), lambda: None


@case
def iterator_of_an_object():
    class Values:
        def __init__(self):
            self.i = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.i += 1
            return 1.0 if self.i < 9 else 0.5

    numbers = Values()
    return model_of(lambda: next(numbers)), lambda: None


@case
def iterator_in_a_loop():
    numbers = iter([1.0] * 9 + [0.5] * 100)

    def read():
        for each in numbers:
            return each

    return model_of(read), lambda: None


@case
def counter():
    count = itertools.count()
    return model_of(lambda: 1.0 if next(count) < 9 else 0.5), lambda: None


@case
def counter_in_a_dictionary():
    state = collections.Counter()

    def read():
        local = state
        local["steps"] += 1
        return 1.0 if local["steps"] < 9 else 0.5

    return model_of(read), lambda: None


@case
def generator_of_numpy():
    rng = np.random.default_rng(3)
    return model_of(lambda: 1.0 if rng.random() < 0.85 else 0.5), lambda: None


@case
def generator_of_python():
    rng = random.Random(5)
    return model_of(lambda: 1.0 if rng.random() < 0.85 else 0.5), lambda: None


@case
def generator_of_torch():
    rng = torch.Generator().manual_seed(0)
    return model_of(lambda: torch.rand((), generator=rng) + 0.5), lambda: None


@case
def generator_of_torch_with_a_branch():
    rng = torch.Generator().manual_seed(0)

    def read():
        number = torch.rand((), generator=rng)
        return 1.0 + number if number < 0.8 else 0.5

    return model_of(read), lambda: None


@case
def stack():
    numbers = [0.5] * 30 + [1.0] * 8
    return model_of(lambda: numbers.pop()), lambda: None


@case
def schedule_of_learning_rates():
    optim = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optim, 1, 0.5)
    optim.step()
    return model_of(lambda: schedule.get_last_lr()[0]), schedule.step


@case
def learning_rate():
    optim = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    def read():
        (group,) = optim.param_groups
        return group["lr"]

    return model_of(read), lambda: optim.param_groups[0].update(lr=0.5)


@case
def callback():
    callbacks = []

    def read():
        return sum((each() for each in callbacks), 1.0)

    return model_of(read), lambda: callbacks.append(lambda: 1.0)

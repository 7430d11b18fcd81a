"""Models and what is changed between their steps: each function returns a model, and what changes it.

A model reads what its bytecode does not name: through variables, loops, calls, containers and objects of libraries.
"""

from __future__ import annotations

import array
import collections
import contextvars
import copy
import ctypes
import dataclasses
import enum
import functools
import gc
import itertools
import operator
import os
import random
import sys
import threading
import types
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch import nn

CHANGES: dict[str, Any] = {}


def case(make):
    CHANGES[make.__name__] = make
    return make


def observe(loc, scale=1.0):
    pyro.sample("x", dist.Normal(loc, scale), obs=torch.ones(()))


def model_of(read):
    """Returns a model whose prior's scale is what `read` returns."""

    def model():
        observe(pyro.sample("loc", dist.Normal(0.0, read())))

    return model


class Settings:
    scale = 1.0


@dataclasses.dataclass
class Prior:
    scale: float = 1.0
    weights: list = dataclasses.field(default_factory=lambda: [1.0, 2.0])


@dataclasses.dataclass(slots=True)
class SlottedPrior:
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class FrozenPrior:
    scale: float = 1.0


class Tree:
    def __init__(self, value, *children):
        self.value = value
        self.children = list(children)


PRIOR = Prior()
OTHER = types.ModuleType("other")
OTHER.scale = 1.0
NESTED = {"a": {"b": [1.0, {"c": 1.0}]}}


# Through variables and calls.


@case
def class_attribute():
    class Local:
        scale = 1.0

    return model_of(lambda: Local.scale), lambda: setattr(Local, "scale", 0.5)


@case
def class_attribute_of_instance():
    class Local:
        scale = 1.0

    each = Local()
    return model_of(lambda: each.scale), lambda: setattr(Local, "scale", 0.5)


@case
def inherited_class_attribute():
    class Base:
        scale = 1.0

    class Derived(Base):
        pass

    return model_of(lambda: Derived.scale), lambda: setattr(Base, "scale", 0.5)


@case
def module_attribute():
    OTHER.scale = 1.0
    return model_of(lambda: OTHER.scale), lambda: setattr(OTHER, "scale", 0.5)


@case
def function_attribute():
    def model():
        observe(pyro.sample("loc", dist.Normal(0.0, model.scale)))

    model.scale = 1.0
    return model, lambda: setattr(model, "scale", 0.5)


@case
def variable():
    prior = Prior()

    def read():
        local = prior
        return local.scale

    return model_of(read), lambda: setattr(prior, "scale", 0.5)


@case
def variable_of_one_of_two_equal_closures():
    def prior(scale):
        def read():
            return scale

        def write(value):
            nonlocal scale
            scale = value

        return read, write

    (first, _), (second, write) = prior(1.0), prior(1.0)
    return model_of(lambda: first() * second()), lambda: write(0.5)


@case
def variable_that_the_collector_does_not_look_at():
    scale = 1.0

    def read():
        return scale

    def change():
        nonlocal scale
        gc.unfreeze()
        scale = 0.5

    gc.freeze()
    return model_of(read), change


@case
def argument():
    prior = Prior()

    def scale_of(each):
        return each.scale

    return model_of(lambda: scale_of(prior)), lambda: setattr(prior, "scale", 0.5)


@case
def default_argument():
    prior = Prior()

    def model(prior=prior):
        observe(pyro.sample("loc", dist.Normal(0.0, prior.scale)))

    return model, lambda: setattr(prior, "scale", 0.5)


@case
def default_container():
    settings = {"scale": 1.0}

    def model(settings=settings):
        observe(pyro.sample("loc", dist.Normal(0.0, settings["scale"])))

    return model, lambda: settings.update(scale=0.5)


@case
def default_argument_itself():
    def read(scale=1.0):
        return scale

    return model_of(lambda: read()), lambda: setattr(read, "__defaults__", (0.5,))


@case
def keyword_default_of_helper():
    prior = Prior()

    def read(*, prior=prior):
        return prior.scale

    return model_of(lambda: read()), lambda: setattr(prior, "scale", 0.5)


@case
def partial_argument():
    prior = Prior()

    def model(prior):
        observe(pyro.sample("loc", dist.Normal(0.0, prior.scale)))

    return functools.partial(model, prior), lambda: setattr(prior, "scale", 0.5)


@case
def partial_keyword():
    def model(scale):
        observe(pyro.sample("loc", dist.Normal(0.0, scale)))

    bound = functools.partial(model, scale=1.0)
    return bound, lambda: bound.keywords.update(scale=0.5)


@case
def partial_of_partial():
    settings = [1.0]

    def read(settings, index):
        return settings[index]

    bound = functools.partial(functools.partial(read, settings), 0)
    return model_of(bound), lambda: settings.__setitem__(0, 0.5)


@case
def callable_instance():
    class Model:
        def __init__(this):
            this.scale = 1.0

        def __call__(this):
            observe(pyro.sample("loc", dist.Normal(0.0, this.scale)))

    model = Model()
    return model, lambda: setattr(model, "scale", 0.5)


@case
def bound_method():
    class Reader:
        def __init__(me):
            me.scale = 1.0

        def read(me):
            return me.scale

    reader = Reader()
    return model_of(reader.read), lambda: setattr(reader, "scale", 0.5)


@case
def computed_attribute():
    prior = Prior()
    name = "".join(["sc", "ale"])
    return model_of(lambda: getattr(prior, name)), lambda: setattr(prior, "scale", 0.5)


@case
def attribute_dictionary():
    prior = Prior()
    return model_of(lambda: vars(prior)["scale"]), lambda: setattr(prior, "scale", 0.5)


@case
def attrgetter():
    prior = Prior()
    read = operator.attrgetter("scale")
    return model_of(lambda: read(prior)), lambda: setattr(prior, "scale", 0.5)


@case
def as_dictionary():
    prior = Prior()
    return model_of(lambda: dataclasses.asdict(prior)["scale"]), lambda: setattr(prior, "scale", 0.5)


@case
def copied():
    prior = Prior()
    return model_of(lambda: copy.deepcopy(prior).scale), lambda: setattr(prior, "scale", 0.5)


@case
def slots():
    prior = SlottedPrior()

    def read():
        each = prior
        return each.scale

    return model_of(read), lambda: setattr(prior, "scale", 0.5)


@case
def dataclass_list():
    prior = Prior()
    return model_of(lambda: sum(prior.weights)), lambda: prior.weights.__setitem__(0, 0.5)


@case
def frozen_dataclass_replaced():
    holder = {"prior": FrozenPrior()}

    def read():
        local = holder
        return local["prior"].scale

    return model_of(read), lambda: holder.update(prior=FrozenPrior(0.5))


@case
def frozen_dataclass_forced():
    prior = FrozenPrior()
    return model_of(lambda: prior.scale), lambda: object.__setattr__(prior, "scale", 0.5)


@case
def namespace():
    settings = types.SimpleNamespace(prior=types.SimpleNamespace(scale=1.0))

    def read():
        local = settings.prior
        return local.scale

    return model_of(read), lambda: setattr(settings.prior, "scale", 0.5)


@case
def property_of_another_object():
    class Schedule:
        def __init__(self):
            self.hidden = {"value": 1.0}

        @property
        def scale(self):
            key = "value"
            return self.hidden[key]

    schedule = Schedule()
    return model_of(lambda: schedule.scale), lambda: schedule.hidden.update(value=0.5)


@case
def attribute_by_getattr_method():
    class Dynamic:
        def __init__(self):
            self.__dict__["store"] = {"scale": 1.0}

        def __getattr__(self, name):
            return self.store[name]

    dynamic = Dynamic()
    return model_of(lambda: dynamic.scale), lambda: dynamic.store.update(scale=0.5)


@case
def decorated():
    prior = Prior()

    def doubled(function):
        @functools.wraps(function)
        def inner():
            return 2 * function()

        return inner

    @doubled
    def read():
        return prior.scale

    return model_of(read), lambda: setattr(prior, "scale", 0.5)


@case
def function_replaced():
    holder = types.SimpleNamespace(read=lambda: 1.0)

    def read():
        local = holder
        return local.read()

    return model_of(read), lambda: setattr(holder, "read", lambda: 0.5)


@case
def method_replaced_in_class():
    class Reader:
        def read(self):
            return 1.0

    reader = Reader()
    return model_of(lambda: reader.read()), lambda: setattr(Reader, "read", lambda self: 0.5)


@case
def class_replaced():
    holder = {"kind": dist.Normal}

    def model():
        kind = holder["kind"]
        observe(pyro.sample("loc", kind(0.0, 1.0)))

    return model, lambda: holder.update(kind=dist.Laplace)


# Containers.


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


# Arrays and memory.


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


# State that steps move.


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


# Tensors changed by what torch's dispatcher does not see.


@case
def applied_function():
    return model_of(lambda: torch.ones(3).apply_(lambda value: value * 2.0).sum()), lambda: None


@case
def applied_function_on_a_sample():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        observe(loc + loc.detach().clone().apply_(lambda value: value * 2.0))

    return model, lambda: None


@case
def data_assigned():
    tensor = torch.ones(3)

    def change():
        tensor.data = torch.full((3,), 2.0)

    return model_of(lambda: tensor.exp().sum()), change


@case
def data_of_another_shape():
    tensor = torch.ones(3)

    def change():
        tensor.data = torch.ones(5)

    return model_of(lambda: tensor.sum()), change


@case
def memory_resized():
    tensor = torch.ones(4)
    return model_of(lambda: tensor.sum()), lambda: tensor.resize_(2)


@case
def capsule_of_a_tensor():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        other = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(loc.detach()))
        observe(loc + other)

    return model, lambda: None


# Parameters.


@case
def hook_on_a_parameter():
    pyro.param("a", torch.ones(()))
    param = pyro.param("a").unconstrained()

    def model():
        observe(pyro.param("a") * 2.0)

    return model, lambda: param.register_hook(lambda gradient: gradient * 3.0)


@case
def hook_removed():
    pyro.param("a", torch.ones(()))
    handle = pyro.param("a").unconstrained().register_hook(lambda gradient: gradient * 3.0)

    def model():
        observe(pyro.param("a") * 2.0)

    return model, handle.remove


@case
def hook_after_accumulation():
    pyro.param("a", torch.ones(()))
    param = pyro.param("a").unconstrained()

    def model():
        observe(pyro.param("a") * 2.0)

    def change():
        def triple(each):
            each.grad.mul_(3.0)

        param.register_post_accumulate_grad_hook(triple)

    return model, change


@case
def constraint():
    def model():
        observe(pyro.param("a", torch.ones(()), constraint=constraints.positive))

    def change():
        pyro.get_param_store()._constraints["a"] = constraints.interval(0.0, 5.0)

    return model, change


@case
def prior_of_a_weight():
    net = pyro.nn.PyroModule[nn.Linear](1, 1)
    net.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

    def model():
        observe(net(torch.ones(1, 1)).sum())

    def change():
        net.weight = pyro.nn.PyroSample(dist.Normal(0.0, 5.0).expand([1, 1]).to_event(2))

    return model, change


@case
def prior_of_a_weight_by_a_function():
    class Net(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = 1.0
            self.weight = pyro.nn.PyroSample(lambda self: dist.Normal(0.0, self.scale))

        def forward(self):
            observe(self.weight)

    net = Net()
    return net, lambda: setattr(net, "scale", 0.5)


@case
def class_attribute_of_a_module():
    class Net(pyro.nn.PyroModule):
        scale = 1.0

        def forward(self):
            observe(pyro.sample("loc", dist.Normal(0.0, self.scale)))

    return Net(), lambda: setattr(Net, "scale", 0.5)


@case
def attribute_that_hides_a_class_attribute():
    class Net(nn.Module):
        scale = 1.0

        def forward(self):
            observe(pyro.sample("loc", dist.Normal(0.0, self.scale)))

    net = Net()
    return net, lambda: setattr(net, "scale", 0.5)


@case
def attributes_of_layers_in_a_loop():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = 1.0

    layers = nn.ModuleList([Layer(), Layer()])
    return model_of(lambda: sum(each.scale for each in layers)), lambda: setattr(layers[1], "scale", 0.5)


@case
def buffer_replaced():
    net = nn.Module()
    net.register_buffer("scale", torch.ones(()))

    def read():
        local = net
        return local.scale

    return model_of(read), lambda: setattr(net, "scale", torch.tensor(0.5))


@case
def buffer_written_to():
    net = nn.Module()
    net.register_buffer("scale", torch.ones(()))
    return model_of(lambda: net.scale.exp()), lambda: net.scale.fill_(0.5)


@case
def momentum_of_batch_norm():
    net = nn.BatchNorm1d(1)

    def model():
        pyro.module("net", net)
        observe(net(torch.tensor([[1.0], [2.0]])).sum())

    return model, lambda: setattr(net, "momentum", 0.9)


@case
def functional_dropout():
    net = nn.Module()
    return model_of(lambda: nn.functional.dropout(torch.ones(8), 0.5, net.training).sum() + 1.0), net.eval


@case
def training_flag_read_through_a_variable():
    net = nn.Module()

    def read():
        local = net
        return 1.0 if local.training else 2.0

    return model_of(read), net.eval


@case
def hook_of_all_modules():
    net = nn.Linear(1, 1)
    handles = []

    def model():
        pyro.module("net", net)
        observe(net(torch.ones(1, 1)).sum())
        for each in handles:
            each.remove()

    def change():
        register = nn.modules.module.register_module_forward_hook
        handles.append(register(lambda module, args, result: result * 3.0 if module is net else None))

    return model, change


# Handlers and distributions.


@case
def handler_made_in_each_step():
    prior = Prior()

    def model():
        with poutine.scale(scale=prior.scale):
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return model, lambda: setattr(prior, "scale", 0.5)


@case
def data_of_a_condition():
    data = {"loc": torch.ones(())}

    def inner():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.LogNormal(0.0, 1.0)))

    return poutine.condition(inner, data), lambda: data.update(loc=torch.tensor(3.0))


@case
def data_of_a_condition_within():
    data = {"loc": torch.ones(())}
    handler = poutine.condition(data=data)

    def model():
        with handler:
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), pyro.sample("scale", dist.LogNormal(0.0, 1.0)))

    return model, lambda: handler.data.update(loc=torch.tensor(3.0))


@case
def mask_of_a_handler():
    handler = poutine.mask(mask=torch.tensor(True))

    def model():
        with handler:
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return model, lambda: setattr(handler, "mask", torch.tensor(False))


@case
def reparameterization():
    strategy = LocScaleReparam(0.0)

    def inner():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        observe(pyro.sample("loc", dist.Normal(0.0, scale)))

    return poutine.reparam(inner, {"loc": strategy}), lambda: setattr(strategy, "centered", 0.5)


@case
def hidden_sites():
    hidden = {"other"}

    def inner():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))
        with poutine.block(hide_fn=lambda site: site["name"] in hidden):
            pyro.factor("more", torch.ones(()))

    return inner, lambda: hidden.add("more")


@case
def wrapped_handlers():
    handler = poutine.scale(scale=0.5)

    def inner():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    return poutine.mask(handler(inner), mask=torch.tensor(True)), lambda: setattr(handler, "scale", 0.25)


@case
def distribution_in_a_container():
    priors = {"loc": [dist.Normal(0.0, 1.0)]}

    def model():
        for each in priors["loc"]:
            observe(pyro.sample("loc", each))

    return model, lambda: setattr(priors["loc"][0], "scale", torch.tensor(0.5))


@case
def base_of_a_distribution():
    prior = dist.Independent(dist.Normal(torch.zeros(2), 1.0), 1)

    def model():
        observe(pyro.sample("loc", prior).sum())

    return model, lambda: setattr(prior.base_dist, "scale", torch.full((2,), 0.5))


@case
def transform_of_a_distribution():
    transform = dist.transforms.AffineTransform(0.0, 1.0)
    prior = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])

    def model():
        observe(pyro.sample("loc", prior))

    return model, lambda: setattr(transform, "scale", 0.5)


@case
def distribution_of_the_user():
    class Weighted(dist.Normal):
        factor = 1.0

        def log_prob(self, value):
            return super().log_prob(value) * Weighted.factor

    def model():
        observe(pyro.sample("loc", Weighted(0.0, 1.0)))

    return model, lambda: setattr(Weighted, "factor", 0.5)


@case
def size_of_a_plate():
    plate = pyro.plate("rows", 3)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with plate:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(3))

    return model, lambda: setattr(plate, "scale", 5.0)


@case
def subsample_of_a_plate():
    rows = torch.arange(3)
    data = torch.arange(10.0)

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 10, subsample=rows) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data[index])

    return model, lambda: rows.add_(2)

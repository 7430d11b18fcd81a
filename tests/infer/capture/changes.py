"""Models and what is changed between their steps: each function returns a model, and what changes it.

A model reads what its bytecode does not name: through variables, loops, calls, containers and objects of libraries.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import operator
import types
from typing import Any

import pyro
import pyro.distributions as dist
import torch

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

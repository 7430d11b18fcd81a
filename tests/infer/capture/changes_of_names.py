"""More of `changes`: under names that are private, absent, imported, in patterns, or those of a class's members."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import functools
import math
import os
import sys
import types
from collections import namedtuple
from os import getenv

import pyro
import torch
from pyro.contrib import gp
from pyro.ops.tensor_utils import safe_cholesky
from torch import nn

from tests.infer.capture.changes import Prior, case, model_of, observe

IMPORTED = types.ModuleType("settings_of_a_test")
sys.modules[IMPORTED.__name__] = IMPORTED


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self._scale = 1.0

    def forward(self):
        return self._scale


@case
def private_attribute_of_a_module():
    module = Scale()
    return model_of(lambda: module()), lambda: setattr(module, "_scale", 0.5)


@case
def attribute_that_a_module_gets_later():
    module = Scale()
    return model_of(lambda: getattr(module, "other", 1.0)), lambda: setattr(module, "other", 0.5)


@case
def forward_of_an_instance():
    module = Scale()
    return model_of(lambda: module()), lambda: setattr(module, "forward", lambda: 0.5)


@case
def forward_of_a_class():
    class Local(Scale):
        def forward(self):
            return 1.0

    module = Local()
    return model_of(lambda: module()), lambda: setattr(Local, "forward", lambda self: 0.5)


@case
def layers_that_are_added_to_none():
    layers = nn.ModuleList()

    def read():
        scale = torch.tensor(2.0)
        for layer in layers:
            scale = layer(scale)
        return scale

    return model_of(read), lambda: layers.append(nn.Sigmoid())


@case
def data_of_a_gaussian_process():
    x = torch.arange(4.0)
    process = gp.models.GPRegression(x, x.sin(), gp.kernels.RBF(1))

    def model():
        process.model()
        observe(pyro.sample("loc", pyro.distributions.Normal(0.0, 1.0)))

    return model, lambda: process.set_data(x + 1, x.cos())


@case
def number_of_an_imported_module():
    IMPORTED.SCALE = 1.0

    def read():
        import settings_of_a_test  # type: ignore[import-not-found]

        return settings_of_a_test.SCALE

    return model_of(read), lambda: setattr(IMPORTED, "SCALE", 0.5)


@case
def number_imported_from_a_module():
    IMPORTED.SCALE = 1.0

    def read():
        from settings_of_a_test import SCALE

        return SCALE

    return model_of(read), lambda: setattr(IMPORTED, "SCALE", 0.5)


@case
def result_that_is_kept():
    @functools.lru_cache
    def prior():
        return Prior()

    return model_of(lambda: prior().scale), lambda: setattr(prior(), "scale", 0.5)


@case
def cache_that_is_cleared():
    scales = [1.0]

    @functools.cache
    def scale():
        return scales[0]

    def change():
        scales[0] = 0.5
        scale.cache_clear()

    return model_of(scale), change


@case
def pattern_of_a_class():
    prior = Prior()

    def read():
        match prior:
            case Prior(scale=scale):
                return scale

    return model_of(read), lambda: setattr(prior, "scale", 0.5)


@case
def field_that_is_called_shape():
    shaped = namedtuple("shaped", "shape rate")
    holder = types.SimpleNamespace(prior=shaped(1.0, 1.0))
    return model_of(lambda: holder.prior.shape), lambda: setattr(holder, "prior", shaped(0.5, 1.0))


@case
def global_that_is_not_there_yet():
    globals().pop("LATER", None)

    def read():
        try:
            return LATER  # type: ignore[name-defined]  # noqa: F821
        except NameError:
            return 1.0

    return model_of(read), lambda: globals().update(LATER=0.5)


@case
def global_by_its_name():
    globals()["BY_NAME"] = 1.0
    return model_of(lambda: globals()["BY_NAME"]), lambda: globals().update(BY_NAME=0.5)


@case
def slot_that_is_empty():
    class Slotted:
        __slots__ = ("scale",)

    each = Slotted()
    return model_of(lambda: getattr(each, "scale", 1.0)), lambda: setattr(each, "scale", 0.5)


@case
def attribute_in_place_of_another():
    each = types.SimpleNamespace(other=1.0)

    def change():
        del each.other
        each.scale = 0.5

    return model_of(lambda: getattr(each, "scale", 1.0)), change


@case
def variable_by_getenv_alone():
    os.environ["DISTOPT_TEST_SCALE"] = "1.0"
    return (
        model_of(lambda: float(getenv("DISTOPT_TEST_SCALE", "1"))),
        lambda: os.environ.update(DISTOPT_TEST_SCALE="0.5"),
    )


@case
def attribute_of_a_tensor():
    tensor = torch.ones(())
    tensor.scale = 1.0  # type: ignore[attr-defined]
    return model_of(lambda: tensor * tensor.scale), lambda: setattr(tensor, "scale", 0.5)


@case
def default_of_a_method():
    class Local:
        def scale(self, value=1.0):
            return value

    each = Local()
    return model_of(lambda: each.scale()), lambda: setattr(Local.scale, "__defaults__", (0.5,))


@case
def property_that_is_replaced():
    class Local:
        scale = property(lambda self: 1.0)

    each = Local()
    return model_of(lambda: each.scale), lambda: setattr(Local, "scale", property(lambda self: 0.5))


@case
def function_of_a_class_that_is_replaced():
    class Local:
        scale = staticmethod(lambda: 1.0)

    return model_of(lambda: Local.scale()), lambda: setattr(Local, "scale", staticmethod(lambda: 0.5))


@case
def attribute_by_a_function_of_another_name():
    prior = Prior()
    get = getattr
    return model_of(lambda: get(prior, "scale")), lambda: setattr(prior, "scale", 0.5)


@case
def value_of_an_enumeration():
    class Kind(enum.Enum):
        A = dataclasses.field(default=1.0)
        B = [1.0]

    return model_of(lambda: Kind.B.value[0]), lambda: Kind.B.value.__setitem__(0, 0.5)


@case
def types_in_a_set():
    scales = {1.0, 2.0}

    def read():
        return 1.0 if all(type(each) is float for each in scales) else 0.5

    def change():
        scales.clear()
        scales.update({1, 2})

    return model_of(read), change


@case
def setting_of_pyro():
    matrix = torch.eye(2)

    def change():
        # Undone by the next case that makes this model.
        pyro.settings.set(cholesky_relative_jitter=64.0)

    pyro.settings.set(cholesky_relative_jitter=4.0)
    return model_of(lambda: safe_cholesky(matrix).sum()), change


@case
def attribute_of_a_metaclass():
    class Kind(type):
        scale = 1.0

    class Of(metaclass=Kind):
        pass

    return model_of(lambda: Of.scale), lambda: setattr(Kind, "scale", 0.5)


@case
def name_of_all_modules():
    builtins.scale_of_a_test = 1.0
    return model_of(lambda: scale_of_a_test), lambda: setattr(builtins, "scale_of_a_test", 0.5)  # noqa: F821


@case
def class_of_a_number():
    class Wide(float):
        scale = 1.0

    class Narrow(float):
        scale = 0.5

    number = Wide(1.0)
    return model_of(lambda: number.scale), lambda: setattr(number, "__class__", Narrow)


@case
def class_attribute_of_a_number():
    class Wide(float):
        scale = 1.0

    number = Wide(1.0)
    return model_of(lambda: number.scale), lambda: setattr(Wide, "scale", 0.5)


@case
def slot_of_a_number():
    class Wide(float):
        __slots__ = ("scale",)

    number = Wide(1.0)
    number.scale = 1.0
    return model_of(lambda: number.scale), lambda: setattr(number, "scale", 0.5)


@case
def zero_in_a_complex_number():
    holder = types.SimpleNamespace(number=complex(1.0, 0.0))

    def read():
        local = holder
        return 0.5 if math.copysign(1.0, local.number.imag) < 0 else 1.0

    return model_of(read), lambda: setattr(holder, "number", complex(1.0, -0.0))


@case
def class_of_a_tensor():
    class Half(torch.Tensor):
        @property
        def scale(self):
            return 0.5

    tensor = torch.ones(())
    return model_of(lambda: getattr(tensor, "scale", 1.0)), lambda: setattr(tensor, "__class__", Half)

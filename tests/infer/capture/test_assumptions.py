"""Whatever a captured step takes for granted, changed between steps: the step must be the eager one all the same."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from distopt.infer.capture import StepCapture
from tests.infer.capture.steps import EagerSteps, assert_same, run_steps

SCALE = 1.0
SETTINGS = {"scale": 1.0}
TENSOR = torch.ones(5)


def observe(loc, scale=1.0):
    pyro.sample("x", dist.Normal(loc, scale), obs=torch.ones(()))


def empty_guide():
    pyro.param("unused", torch.zeros(()))


class GlobalNumber:
    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, SCALE)))

    def change(self):
        global SCALE
        SCALE = 0.5

    def reset(self):
        global SCALE
        SCALE = 1.0


class GlobalItem(GlobalNumber):
    def model(self):
        with poutine.scale(scale=SETTINGS["scale"]):
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    def change(self):
        SETTINGS["scale"] = 0.5

    def reset(self):
        SETTINGS["scale"] = 1.0


class GlobalTensor(GlobalNumber):
    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)) * TENSOR.sum())

    def change(self):
        global TENSOR
        TENSOR = torch.full((5,), 3.0)

    def reset(self):
        global TENSOR
        TENSOR = torch.ones(5)


class TensorWrittenTo:
    """Small tensors are folded into constants, and NumPy's view of them changes no version."""

    def __init__(self):
        self.factor = torch.ones(3)
        self.array = self.factor.numpy()

    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)) * (self.factor * 2.0).exp().sum())

    def change(self):
        self.array[1] = 4.0


class LargeTensorWrittenTo(TensorWrittenTo):
    def __init__(self):
        self.factor = torch.ones(3000)
        self.array = self.factor.numpy()


class ClosureData:
    def __init__(self):
        data = torch.ones(5)

        def model():
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(data)):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=data)

        def change():
            nonlocal data
            data = torch.zeros(7)

        self.model, self.change = model, change


class ClosureNumber:
    def __init__(self):
        scale = 1.0

        def inner():
            return scale * 2.0

        def model():
            observe(pyro.sample("loc", dist.Normal(0.0, inner())))

        def change():
            nonlocal scale
            scale = 2

        self.model, self.change = model, change


class ClosureList:
    def __init__(self):
        scales = [1.0, 2.0]

        def model():
            observe(pyro.sample("loc", dist.Normal(0.0, sum(scales))))

        self.model = model
        self.change = functools.partial(scales.__setitem__, 1, 3.0)


class Attribute:
    def __init__(self):
        self.scale = 1.0

    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, self.scale)))

    def change(self):
        self.scale = 3.0


class NestedAttribute(Attribute):
    def __init__(self):
        self.config = {"prior": {"scale": 1.0}}

    def scale_of(self):
        return self.config["prior"]["scale"]

    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, self.scale_of())))

    def change(self):
        self.config["prior"]["scale"] = 2.0


class IntegerForFloat(Attribute):
    """1 and 1.0 are equal, and make tensors of different types."""

    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)), torch.tensor([self.scale, 2]).sum() / 3)

    def change(self):
        self.scale = 1


class Prior(Attribute):
    """A distribution that is made once: its parameters are read by code that is not the user's."""

    def __init__(self):
        self.prior = dist.Normal(0.0, 1.0)

    def model(self):
        observe(pyro.sample("loc", self.prior))

    def change(self):
        self.prior.scale = torch.tensor(2.0)


class Handler(Attribute):
    def __init__(self):
        self.handler = poutine.scale(scale=0.5)

    def model(self):
        with self.handler:
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    def change(self):
        self.handler.scale = 0.25


class WrappedModel:
    """The handler around the model is an object of Pyro's."""

    def __init__(self):
        def model():
            observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

        self.handler = poutine.scale(scale=0.5)
        self.model = self.handler(model)

    def change(self):
        self.handler.scale = 0.25


class Layers:
    def __init__(self):
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))

    def model(self):
        pyro.module("net", self.net)
        observe(self.net(torch.ones(5, 1)).sum())


class Evaluation(Layers):
    guide = staticmethod(empty_guide)

    def change(self):
        self.net.eval()


class DropoutRate(Layers):
    guide = staticmethod(empty_guide)

    def change(self):
        self.net[1].p = 0.1


class LayerReplaced(Layers):
    guide = staticmethod(empty_guide)

    def change(self):
        self.net[1] = torch.nn.Tanh()


class Hook(Layers):
    guide = staticmethod(empty_guide)

    def change(self):
        self.net[0].register_forward_hook(lambda module, args, result: result * 2.0)


class ParameterFrozen:
    def model(self):
        observe(pyro.param("a", torch.ones(())) * pyro.param("b", torch.ones(())))

    guide = staticmethod(empty_guide)

    def change(self):
        pyro.get_param_store()._params["a"].requires_grad_(False)


class ParameterReplaced(ParameterFrozen):
    def change(self):
        pyro.get_param_store()["a"] = torch.tensor(5.0)


class ParameterData(ParameterFrozen):
    def change(self):
        pyro.get_param_store()._params["a"].data = torch.tensor(5.0)


class LateParameter(ParameterFrozen):
    def __init__(self):
        self.late = False

    def model(self):
        scale = pyro.param("c", torch.tensor(2.0)) if self.late else 1.0
        observe(pyro.param("a", torch.ones(())) * scale)

    def change(self):
        self.late = True


class ElboSetting:
    def model(self):
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    def change(self):
        self.elbo.num_particles = 3


CASES = [
    GlobalNumber,
    GlobalItem,
    GlobalTensor,
    TensorWrittenTo,
    LargeTensorWrittenTo,
    ClosureData,
    ClosureNumber,
    ClosureList,
    Attribute,
    NestedAttribute,
    IntegerForFloat,
    Prior,
    Handler,
    WrappedModel,
    Evaluation,
    DropoutRate,
    LayerReplaced,
    Hook,
    ParameterFrozen,
    ParameterReplaced,
    ParameterData,
    LateParameter,
    ElboSetting,
]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_what_changes_between_steps_changes_the_captured_step(kind):
    results = []
    for make in (EagerSteps, StepCapture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        case = kind()
        case.elbo = Trace_ELBO()
        step = make(case.elbo.loss_and_grads)
        guide = case.guide if hasattr(case, "guide") else AutoNormal(case.model)
        model = case.model
        results.append(
            run_steps(step, model, guide, (), 20, before_step=lambda i, case=case: case.change() if i == 9 else None)
        )
        if hasattr(case, "reset"):
            case.reset()
    assert_same(*results)
    assert step.refusal is None
    assert step.num_captured >= 5 + 5  # before the change and after it


def test_nothing_is_taken_for_granted_that_the_model_does_not_read():
    pyro.clear_param_store()
    case = Attribute()
    case.unread = 1
    step = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(case.model)

    def change(i):
        case.unread = i

    run_steps(step, case.model, guide, (), 12, before_step=change)
    assert step.num_captured == 8


def test_steps_under_a_handler_are_eager():
    def model():
        observe(pyro.sample("loc", dist.Normal(0.0, 1.0)))

    step = StepCapture(Trace_ELBO().loss_and_grads)
    guide = AutoNormal(model)
    run_steps(step, model, guide, (), 5)
    captured = step.num_captured
    with poutine.scale(scale=2.0):
        run_steps(step, model, guide, (), 3)
    assert step.num_captured == captured == 2

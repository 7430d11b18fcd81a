"""Tensors, parameters and modules that change between steps."""

from __future__ import annotations

import collections

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import nn

from tests.infer.capture.changes import Settings, case, model_of, observe


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


@case
def attributes_of_an_object_replaced():
    holder = Settings()
    holder.scale = 1.0
    return model_of(lambda: holder.scale), lambda: setattr(holder, "__dict__", {"scale": 0.5})


@case
def attributes_of_a_layer_replaced():
    layer = nn.Softplus()
    return model_of(lambda: layer(torch.ones(()))), lambda: setattr(layer, "__dict__", {**vars(layer), "beta": 2.0})


@case
def hooks_of_a_layer_replaced():
    layer = nn.Softplus()

    def change():
        layer._forward_hooks = collections.OrderedDict({0: lambda module, args, result: 2.0 * result})

    return model_of(lambda: layer(torch.ones(()))), change


@case
def buffer_added():
    layer = nn.Softplus()

    def read():
        return 1.0 + len(list(layer.buffers()))

    return model_of(read), lambda: layer.register_buffer("scale", torch.ones(()))


@case
def flag_that_becomes_a_number():
    holder = Settings()
    holder.scale = False

    def read():
        return 1.0 if type(holder.scale) is bool else 0.5

    return model_of(read), lambda: setattr(holder, "scale", 0)


@case
def zero_that_becomes_another_zero():
    holder = Settings()
    holder.scale = 0

    def read():
        return 1.0 if type(holder.scale) is int else 0.5

    return model_of(read), lambda: setattr(holder, "scale", 0.0)


@case
def names_of_buffers_exchanged():
    net = nn.Module()
    one, two = torch.ones(()), torch.tensor(2.0)
    net.register_buffer("scale", one)
    net.register_buffer("other", two)

    def change():
        del net.scale, net.other
        net.register_buffer("other", one)
        net.register_buffer("scale", two)

    return model_of(lambda: net.scale * 1.0), change


@case
def names_of_parameters_exchanged():
    net = nn.Module()
    one, two = (nn.Parameter(torch.tensor(value), requires_grad=False) for value in (1.0, 2.0))
    net.scale, net.other = one, two

    def change():
        net._parameters.clear()
        net.other, net.scale = one, two

    return model_of(lambda: net.scale * 1.0), change


@case
def hook_in_place_of_another():
    layer = nn.Softplus()
    handle = layer.register_forward_hook(lambda module, args, result: result * 1.0)

    def change():
        layer._forward_hooks[handle.id] = lambda module, args, result: result * 3.0

    return model_of(lambda: layer(torch.ones(()))), change


@case
def attribute_in_a_slot_of_a_module():
    class Layer(nn.Module):
        __slots__ = ("scale",)

        def forward(self, x):
            return x * self.scale

    layer = Layer()
    layer.scale = 1.0
    return model_of(lambda: layer(torch.ones(()))), lambda: setattr(layer, "scale", 0.5)


@case
def recurrent_layer():
    layer = nn.LSTM(1, 2)
    layer.requires_grad_(requires_grad=False)
    return model_of(lambda: 1.0 + layer(torch.ones(2, 1, 1))[0].sum() ** 2), lambda: layer.bias_hh_l0.fill_(0.5)


@case
def denormals_that_become_zeros():
    # Undone by the next case that makes this model.
    torch.set_flush_denormal(False)
    model = model_of(lambda: 1.0 + torch.full((), 1e-39) * 2.0 * 1e30 * 1e9)
    return model, lambda: torch.set_flush_denormal(True)

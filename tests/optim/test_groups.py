"""Every kind of parameter, state and gradient is stepped as torch does, whatever kind of group it comes into."""

import copy
import math

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim.groups import PackedGroup
from tests.optim.trajectories import groups, reference, stepped

pytestmark = pytest.mark.usefixtures("loops")


@pytest.mark.parametrize("name", ["RMSprop", "AdagradRMSProp", "Adagrad"])
@pytest.mark.parametrize("packed", [False, True])
def test_state_of_a_transposed_parameter_loads_into_a_contiguous_one(name, packed):
    shape = (300, 2) if packed else (300, 200)
    gradient = torch.linspace(1.0, 7.0, math.prod(shape)).view(shape)

    def steps(optim, p):
        for _ in range(2):
            p.grad = gradient.clone()
            optim([p])
        return optim

    def make():
        return getattr(distopt.optim, name)({})

    value = torch.linspace(0.0, 6.0, math.prod(shape)).view(shape)
    transposed = torch.nn.Parameter(value.t().contiguous().t())  # the store has no such ones
    (state,) = steps(make(), transposed).get_state().values()
    p = pyro.param("p", transposed.detach().clone(memory_format=torch.contiguous_format)).unconstrained()
    optim = make()
    optim.set_state({"p": state})
    steps(optim, p)
    assert bool(groups(optim, PackedGroup)) == packed
    plain = pyro.param("plain", value.clone()).unconstrained()
    steps(steps(make(), plain), plain)
    torch.testing.assert_close(p.detach(), plain.detach())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "ClippedAdam", "AdagradRMSProp"])
@pytest.mark.parametrize("kind", ["parameter", "gradient", "both", "gaps", "later"])
def test_order_of_memory_changes_no_step(name, kind):
    """Torch's own fused kernels are wrong where a parameter and its gradient lie in different orders."""
    shape = (300, 200)  # too many elements to be packed
    gradient, value = torch.linspace(1.0, 7.0, 60_000).view(shape), torch.linspace(0.0, 6.0, 60_000).view(shape)

    def transposed(x):
        return x.t().contiguous().t()

    def run(module, odd):
        args = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {}
        plain = transposed(value) if kind in ("parameter", "both") else value.clone()
        if kind == "gaps":
            plain = torch.zeros(300, 400)[:, ::2].copy_(value)
        p = torch.nn.Parameter(plain if odd else value.clone())
        optim = getattr(module, name)(args)
        for t in range(4):
            g = gradient * (t + 1) - 3.0 * t
            p.grad = transposed(g) if odd and kind in ("gradient", "both") else g.clone()
            if odd and kind == "later" and t == 2:
                p.grad, p.data = None, transposed(p.data)
                p.grad = g.clone()
            optim([p])
        return p.detach().clone()

    torch.testing.assert_close(run(distopt.optim, True), run(distopt.optim, False))
    torch.testing.assert_close(run(distopt.optim, False), run(pyro.optim, False))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, 2).t(),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(100, 1000),
    ],
    ids=["zero-element", "complex", "non-contiguous", "bfloat16", "large"],
)
def test_every_kind_of_parameter_is_stepped_as_torch_does(value):
    module = torch.nn.Module()
    module.p = torch.nn.Parameter(value.clone())
    pyro.module("m", module)
    other = pyro.param("other", torch.zeros(3)).unconstrained()
    optim = stepped([module.p, other], times=3)
    expected = reference([value, torch.zeros(3)], 3)
    torch.testing.assert_close(
        module.p.detach(), expected[0], rtol=1e-2 if value.dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    torch.testing.assert_close(other.detach(), expected[1])
    assert len(optim.get_state()) == 2


@torch.sparse.check_sparse_tensor_invariants(enable=True)
def test_sparse_gradients_reach_sparse_optimizers():
    for name, args in (("SparseAdam", {"lr": 0.1}), ("SGD", {"lr": 0.1}), ("Adagrad", {"lr": 0.1})):
        pyro.clear_param_store()
        embedding = torch.nn.Embedding(5, 2, sparse=True)
        pyro.module("e", embedding)
        twin = copy.deepcopy(embedding)
        optim, plain = getattr(distopt.optim, name)(args), getattr(torch.optim, name)(twin.parameters(), **args)
        for _ in range(3):
            for module in (embedding, twin):
                module.weight.grad = None
                module(torch.tensor([1, 3])).square().sum().backward()
            optim([embedding.weight])
            plain.step()
        torch.testing.assert_close(embedding.weight, twin.weight)

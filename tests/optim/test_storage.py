"""Packed parameters stay the user's own tensors."""

import copy
import io
import math

import numpy as np
import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import Adam, FlatGradients
from distopt.optim.groups import ListGroup, PackedGroup
from tests.optim.trajectories import start

pytestmark = pytest.mark.usefixtures("loops")


def stepped(params, optim=None, times=1):
    optim = optim or Adam({"lr": 0.1})
    for _ in range(times):
        for p in params:
            p.grad = torch.ones_like(p)
        optim(params)
    return optim


def groups(optim, kind):
    return [g for g in optim._groups if isinstance(g, kind)]


def packed(params):
    """The gradients of `params` in one buffer."""
    names = tuple(pyro.get_param_store().param_name(p) for p in params)
    return FlatGradients(names, tuple(params), torch.cat([p.grad.reshape(-1) for p in params]))


def reference(values, times):
    """One torch optimizer per tensor, stepped `times` times by ones."""
    found = []
    for value in values:
        p = value.clone().requires_grad_()
        optim = torch.optim.Adam([p], lr=0.1)
        for _ in range(times):
            p.grad = torch.ones_like(p)
            optim.step()
        found.append(p.detach())
    return found


def test_parameters_of_one_life_are_packed_and_stay_the_same_objects():
    params = start()
    before = [(id(p), p.shape) for p in params]
    optim = stepped(params)
    assert [(id(p), p.shape) for p in params] == before
    (group,) = groups(optim, PackedGroup)
    assert len(group.members) == len(params)


def test_saving_or_copying_one_parameter_takes_its_own_bytes_alone():
    params = [pyro.param(f"x{i}", torch.zeros(10)).unconstrained() for i in range(1000)]
    stepped(params)
    assert params[5].untyped_storage().nbytes() == 40
    file = io.BytesIO()
    torch.save(params[5].data, file)
    assert file.tell() < 3_000
    other = copy.deepcopy(params[5])
    with torch.no_grad():
        other.add_(1.0)
    assert not torch.equal(other, params[5])


def test_in_place_changes_by_the_user_are_seen():
    linear = torch.nn.Linear(3, 2)
    pyro.module("net", linear)
    params = list(linear.parameters())
    optim = stepped(params)
    linear.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.full((2,), 5.0)})
    stepped(params, optim)
    torch.testing.assert_close(linear.weight.detach(), torch.full((2, 3), -0.1))
    torch.testing.assert_close(linear.bias.detach(), torch.full((2,), 4.9))


@pytest.mark.parametrize("keep", [False, True])
def test_data_replaced_by_the_user_is_what_is_stepped(keep):
    params = start()
    values = [p.detach().clone() for p in params]
    optim = stepped(params)
    old = params[2].data if keep else None
    params[2].data = values[2].clone()
    stepped(params, optim)
    expected = reference(values, 2)
    torch.testing.assert_close(params[0].detach(), expected[0])
    torch.testing.assert_close(params[2].detach(), values[2] - 0.1, rtol=1e-6, atol=1e-6)
    if keep:
        torch.testing.assert_close(old, values[2] - 0.1, rtol=1e-6, atol=1e-6)
    assert optim.get_state()["net$$$p2"]["state"][0]["step"] == 2


def test_module_moved_to_another_dtype_keeps_its_state():
    linear = torch.nn.Linear(3, 2)
    pyro.module("net", linear)
    params = list(linear.parameters())
    optim = stepped(params, times=3)
    linear.to(torch.float64)
    stepped(params, optim)
    state = optim.get_state()["net$$$weight"]["state"][0]
    assert state["exp_avg"].dtype == linear.weight.dtype == torch.float64
    assert state["step"] == 4


def test_memory_that_others_see_is_not_moved(tmp_path):
    file = tmp_path / "memory"
    file.write_bytes(bytes(12))
    array = np.zeros(3, dtype=np.float32)
    base = torch.zeros(4)
    shared = torch.zeros(3).share_memory_()
    mapped = torch.from_file(str(file), shared=True, size=3)
    owned = [base[:2], shared, mapped, torch.from_numpy(array), torch.from_numpy(array)]
    held, viewed = torch.zeros(3), torch.zeros(3)
    alias = held.view(3, 1)
    owned += [held, viewed.view(1, 3)]
    params = [pyro.param(f"x{i}", t).unconstrained() for i, t in enumerate(owned)]
    del owned, mapped
    optim = stepped(params)
    assert not groups(optim, PackedGroup)
    assert len(groups(optim, ListGroup)) == 1
    torch.testing.assert_close(base, torch.tensor([-0.1, -0.1, 0.0, 0.0]))
    assert shared.is_shared()
    np.testing.assert_allclose(np.frombuffer(file.read_bytes(), np.float32), -0.1, rtol=1e-5)
    torch.testing.assert_close(alias, torch.full((3, 1), -0.1))
    torch.testing.assert_close(viewed, torch.full((3,), -0.1))
    torch.testing.assert_close(params[3].detach(), params[4].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("source", ["store file", "numpy", "bytes"])
def test_parameters_that_were_loaded_are_packed_and_go_on_as_if_never_stopped(source, tmp_path):
    params = start(torch.float32)
    optim = stepped(params, times=2)
    optim.save(tmp_path / "optim")
    pyro.get_param_store().save(str(tmp_path / "params"))
    stepped(params, optim)
    expected = [p.detach().clone() for p in params]
    pyro.clear_param_store()
    store = pyro.get_param_store()
    store.load(str(tmp_path / "params"))
    loaded = dict(store.named_parameters())
    if source != "store file":
        arrays = {name: p.detach().numpy().copy() for name, p in loaded.items()}
        for name, array in arrays.items():
            if source == "numpy":
                store[name] = torch.from_numpy(array)
            else:
                store[name] = torch.frombuffer(bytearray(array), dtype=torch.float32).view(array.shape)
        loaded = dict(store.named_parameters())
    resumed = Adam({"lr": 0.1})
    resumed.load(tmp_path / "optim")
    params = [loaded[f"net$$$p{i}"] for i in range(len(params))]
    sum(p.sum() for p in params).backward()
    resumed(params)
    assert [len(g.members) for g in groups(resumed, PackedGroup)] == [len(params)]
    assert not groups(resumed, ListGroup)
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_parameters_of_an_autoguide_are_packed_though_its_first_trace_shares_their_memory():
    from pyro import distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("y", dist.LogNormal(0.0, 1.0))

    guide, optim = AutoNormal(model), Adam({"lr": 0.1})
    SVI(model, guide, optim, Trace_ELBO()).step()
    assert [len(g.members) for g in groups(optim, PackedGroup)] == [4]
    assert not groups(optim, ListGroup)
    assert guide.locs.x_unconstrained in optim.optim_objs


def test_a_second_optimizer_packs_what_a_first_one_packed():
    params = start()
    values = [p.detach().clone() for p in params]
    del values
    stepped(params)
    second = stepped(params)
    assert len(groups(second, PackedGroup)) == 1
    first = stepped(params, times=2)
    stepped(params, second)
    stepped(params, first)
    assert first.get_state()["net$$$p0"]["state"][0]["step"] == 3
    assert second.get_state()["net$$$p0"]["state"][0]["step"] == 2


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


def test_backward_through_a_stepped_parameter_raises_as_with_torch():
    p = pyro.param("x", torch.ones(3)).unconstrained()
    loss = (p * p).sum()
    optim = stepped([p])
    stepped([p], optim)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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


def test_gradients_handed_over_step_as_those_read_do():
    def run(hands_over):
        params = start(torch.float64)
        optim = Adam({"lr": 0.1}, {"clip_norm": 0.5, "global_norm": 1.0})
        generator = torch.Generator().manual_seed(0)
        flat = None
        for t in range(6):
            chosen = params if t < 3 else params[:4]
            for p in chosen:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if not hands_over:
                optim(chosen)
                continue
            new = packed(chosen[:-1])
            flat = new if flat is None or len(flat.params) != len(new.params) else flat._replace(buffer=new.buffer)
            p = chosen[-1]
            optim.clip_and_step([flat], [(pyro.get_param_store().param_name(p), p, p.grad.clone())])
        return [p.detach().clone() for p in params]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_handed_over_buffer_of_a_whole_group_is_stepped_without_a_copy():
    params = start()
    values = [p.detach().clone() for p in params]
    optim = stepped(params)
    flat = packed(params)
    flat.buffer.fill_(1.0)
    (group,) = groups(optim, PackedGroup)
    optim.clip_and_step([flat])
    assert group.arena.flat.grad.data_ptr() == flat.buffer.data_ptr()
    torch.testing.assert_close([p.detach() for p in params], reference(values, 2))


@pytest.mark.parametrize(("name", "args"), [("ClippedAdam", {"lr": 0.1, "lrd": 0.9}), ("DCTAdam", {"lr": 0.1})])
def test_parameters_whose_lives_part_share_one_optimizer_though_its_rate_decays(name, args):
    params = [pyro.param(f"x{i}", torch.zeros(2)).unconstrained() for i in range(64)]
    optim = getattr(distopt.optim, name)(args)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        stepped([params[i] for i in torch.randperm(64, generator=generator)[:32].tolist()], optim)
    assert len(list(optim._groups)) <= 10
    optimizers = {id(m.group.handle) for m in optim._registry}
    assert len(optimizers) <= 10


def test_groups_do_not_multiply_when_a_different_half_is_touched_each_time():
    params = [pyro.param(f"x{i}", torch.zeros(2)).unconstrained() for i in range(64)]
    optim = Adam({"lr": 0.1})
    counts = dict.fromkeys(range(64), 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        half = torch.randperm(64, generator=generator)[:32].tolist()
        stepped([params[i] for i in half], optim)
        for i in half:
            counts[i] += 1
    assert len(list(optim._groups)) <= 10
    steps = {name: int(s["state"][0]["step"]) for name, s in optim.get_state().items()}
    assert steps == {f"x{i}": n for i, n in counts.items()}
    for i in range(64):
        torch.testing.assert_close(params[i].detach(), reference([torch.zeros(2)], counts[i])[0])

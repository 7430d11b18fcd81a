"""Which parameters are stepped together; what moves, splits and joins keeps its values and its state."""

import pyro
import pytest
import torch

import distopt.optim
from distopt.optim import Adam
from distopt.optim.groups import ListGroup, PackedGroup
from tests.optim.trajectories import groups, reference, start, stepped

pytestmark = pytest.mark.usefixtures("loops")


def test_parameters_of_one_life_are_packed_and_stay_the_same_objects():
    params = start()
    before = [(id(p), p.shape) for p in params]
    optim = stepped(params)
    assert [(id(p), p.shape) for p in params] == before
    (group,) = groups(optim, PackedGroup)
    assert len(group.members) == len(params)


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

"""Which parameters are stepped together; what moves, splits and joins keeps its values and its state."""

import random

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import Adam
from distopt.optim.groups import ListGroup, PackedGroup
from tests.optim.trajectories import OPTIMIZERS, groups, reference, start, stepped

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


@pytest.mark.parametrize("num_params", [9, 20, 21, 30])
def test_a_call_of_a_part_of_a_model_that_has_grown_steps_that_part_alone(num_params):
    """Splitting makes groups, of which too many are joined: but not with what this call leaves out."""
    results = []
    for module in (distopt.optim, pyro.optim):
        pyro.clear_param_store()
        optim = module.Adam({"lr": 0.01})
        for index in range(num_params + 3):
            if index < num_params:
                pyro.param(f"{index:02d}", torch.ones(2, dtype=torch.float64))
            params = dict(pyro.get_param_store().named_parameters())
            for name, p in params.items():
                p.grad = torch.full_like(p, 0.1 * ((7 * index + int(name)) % 5) - 0.2)
            optim([p for name, p in params.items() if index < num_params or int(name) % 5 in (0, 2)])
        results.append({name: p.detach() for name, p in params.items()})
    torch.testing.assert_close(*results)


def test_rates_that_are_set_in_parts_of_many_groups_reach_them_all():
    pyro.clear_param_store()
    optim = distopt.optim.Adam({"lr": 0.01})
    for index in range(14):
        for number in range(3):
            pyro.param(f"{index:02d}.{number}", torch.ones(2))
        params = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
        for p in params:
            p.grad = torch.ones_like(p)
        optim(params)
    assert len(groups(optim, PackedGroup)) == 14

    optim(params[-3:])  # a group by itself: the model grows no more, so what is split next is listed
    for p in params[::2]:
        optim.optim_objs[p].param_groups[0]["lr"] = 0.5
    optim(params)
    rates = [optim.optim_objs[p].param_groups[0]["lr"] for p in params]
    assert rates == [0.01 if position % 2 else 0.5 for position in range(len(params))]


# What shares a group follows from what has happened in a process, so it differs between ranks of which one has no
# gradient of a parameter of its own, and between a run and its resumption. None of it may change a bit.

VARIANTS = [
    *OPTIMIZERS.items(),
    ("SGD", {"lr": 0.1}),
    ("Adam", {"lr": 0.05, "fused": True}),
    ("Adam", {"lr": 0.05, "foreach": True}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    ("ClippedAdam", {"lr": 0.05, "centered_variance": True}),
    ("RMSprop", {"lr": 0.02, "momentum": 0.9, "centered": True}),
]
NUM_CALLS = 45  # more than it takes until groups that were stepped together are joined


class Growing:
    """Parameters of many sizes that appear at random steps, and of which some have no gradient in some steps."""

    def __init__(self, seed, dtype):
        r = random.Random(seed)
        self.numels = [r.randrange(1, 40) for _ in range(12)]
        births = [0, 0, 0] + [r.randrange(1, 25) for _ in self.numels[3:]]
        pausing = {i for i in range(len(births)) if r.random() < 0.3}
        self.calls = [
            [i for i, born in enumerate(births) if born <= t and not (i in pausing and r.random() < 0.3)]
            for t in range(NUM_CALLS)
        ]
        self.seed, self.dtype = seed, dtype

    def start(self):
        pyro.clear_param_store()
        for i, numel in enumerate(self.numels):
            pyro.param(f"{i * 7 % 12:02d}", torch.linspace(-1, 1, numel, dtype=self.dtype))
        store = dict(pyro.get_param_store().named_parameters())
        return [store[f"{i * 7 % 12:02d}"] for i in range(len(self.numels))]

    def set_gradients(self, params, t):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(10_000 * self.seed + 100 * t + i)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) if i in self.calls[t] else None

    def run(self, name, args, alone=False, resume_at=(), clip=None):
        """Returns the values after each call of one optimizer, or of one for each parameter."""
        params, values = self.start(), []
        optims = [getattr(distopt.optim, name)(args, clip) for _ in (params if alone else "1")]
        for t in range(NUM_CALLS):
            if t in resume_at:
                state = optims[0].get_state()
                optims = [getattr(distopt.optim, name)(args, clip)]
                optims[0].set_state(state)
            self.set_gradients(params, t)
            for k, optim in enumerate(optims):
                optim([p for i, p in enumerate(params) if i % len(optims) == k and i in self.calls[t]])
            values.append([p.detach().clone() for p in params])
        return values


def assert_same_bits(values, expected):
    for t, (at_step, expected_at_step) in enumerate(zip(values, expected, strict=True)):
        assert all(map(torch.equal, at_step, expected_at_step)), f"step {t}"


@pytest.mark.sampled(20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
def test_what_shares_a_group_changes_no_bit(name, args, dtype):
    growing = Growing(1, dtype)
    assert_same_bits(growing.run(name, args), growing.run(name, args, alone=True))


@pytest.mark.sampled(10)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
@pytest.mark.parametrize(("name", "args"), VARIANTS, ids=str)
def test_a_resume_at_any_step_around_a_birth_changes_no_bit(name, args, seed):
    growing = Growing(seed, torch.float32)
    expected = growing.run(name, args)
    assert_same_bits(growing.run(name, args, resume_at=range(1, NUM_CALLS)), expected)
    for t in range(2, 30, 9) if seed else (20,):
        assert_same_bits(growing.run(name, args, resume_at=[t]), expected)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "clip", [{"global_norm": 2.0}, {"clip_norm": 0.5}, {"clip_norm": 2.0, "global_norm": 3.0}], ids=str
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adamax"])
def test_a_resume_around_a_birth_changes_no_bit_of_what_is_clipped(name, clip, dtype):
    growing = Growing(2, dtype)
    args = {"lr": 0.05, "momentum": 0.9} if name == "SGD" else {"lr": 0.05}
    expected = growing.run(name, args, clip=clip)
    assert_same_bits(growing.run(name, args, clip=clip, resume_at=range(1, NUM_CALLS)), expected)
    assert_same_bits(growing.run(name, args, clip=clip, resume_at=[12, 29]), expected)

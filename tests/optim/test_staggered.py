"""Parameters that appear one after the other are stepped as pyro.optim steps them, and end up in one group."""

import random

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import PackedState
from distopt.optim.groups import PackedGroup
from distopt.optim.staggered import staggers
from tests.optim.trajectories import groups

NUM_PARAMS = 30
STEADY = 40  # calls until everything that may be joined is

ONE_GROUP = [
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    ("ClippedAdam", {"lr": 0.01, "lrd": 0.97, "clip_norm": 0.5, "weight_decay": 0.01}),
    ("ClippedAdam", {"lr": 0.01, "centered_variance": True}),
    ("Adadelta", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
    ("Rprop", {"lr": 0.01}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
]
LISTED = [("NAdam", {"lr": 0.01}), ("AdagradRMSProp", {"eta": 0.1}), ("Adam", {"lr": 0.01, "foreach": True})]


def step(optim, seed, absent=()):
    """One call with a gradient for each parameter that exists, but for those in `absent`."""
    params = dict(sorted(pyro.get_param_store().named_parameters()))
    for name, p in params.items():
        generator = torch.Generator().manual_seed(1000 * seed + int(name))
        p.grad = None if name in absent else torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optim(list(params.values()))


def appear(index, dtype=torch.float64):
    """Makes one more parameter, whose name comes in no order."""
    name = f"{index * 17 % 101:03d}"
    pyro.param(name, torch.linspace(-1, 1, 1 + index % 7, dtype=dtype))
    return name


def grow(optim, seed, skips):
    """One parameter more at each call, of which some have no gradient at times; then calls with all of them."""
    pyro.clear_param_store()
    r = random.Random(seed)
    for index in range(NUM_PARAMS):
        newest = appear(index)
        names = [name for name, _ in pyro.get_param_store().named_parameters() if name != newest]
        step(optim, index, absent=r.sample(names, len(names) // 3) if skips and r.random() < 0.3 else ())
    for index in range(STEADY):
        step(optim, NUM_PARAMS + index)
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("name", "args"), ONE_GROUP + LISTED, ids=str)
def test_a_model_that_grows_is_stepped_as_by_pyro_optim_value_and_state(name, args, skips):
    optim, reference = getattr(distopt.optim, name)(args), getattr(pyro.optim, name)(args)
    values, expected = grow(optim, 1, skips), grow(reference, 1, skips)
    torch.testing.assert_close(values, expected)

    states = optim.get_state()
    for parameter, state in reference.get_state().items():
        torch.testing.assert_close(states[parameter]["state"], state["state"], check_dtype=False)
        assert states[parameter]["param_groups"][0].get("lr") == state["param_groups"][0].get("lr")


@pytest.mark.parametrize(("name", "args"), ONE_GROUP, ids=str)
def test_after_growth_all_parameters_are_stepped_in_one_call(name, args):
    optim = getattr(distopt.optim, name)(args)
    grow(optim, 1, skips=False)
    assert [type(group) for group in optim._groups] == [PackedGroup]


@pytest.mark.parametrize(("name", "args"), ONE_GROUP, ids=str)
def test_a_grown_state_is_the_same_in_columns_and_in_another_optimizer(name, args):
    optim = getattr(distopt.optim, name)(args)
    grow(optim, 1, skips=True)
    states = optim.get_state()
    torch.testing.assert_close(optim.packed_state().unpack(), states, rtol=0, atol=0)
    torch.testing.assert_close(PackedState.from_states(states).unpack(), states, rtol=0, atol=0)

    before = pyro.get_param_store().get_state()["params"]
    before = {key: p.detach().clone() for key, p in before.items()}
    step(optim, 999)
    expected = {key: p.detach().clone() for key, p in pyro.get_param_store().named_parameters()}
    resumed = getattr(distopt.optim, name)(args)
    resumed.set_state(states)
    with torch.no_grad():
        for key, p in pyro.get_param_store().named_parameters():
            p.copy_(before[key])
    step(resumed, 999)
    torch.testing.assert_close(dict(pyro.get_param_store().named_parameters()), expected, check_dtype=True)
    torch.testing.assert_close(resumed.get_state(), optim.get_state())


def test_a_rate_that_is_set_for_one_of_several_rates_holds_for_it_alone():
    args = {"lr": 0.01, "lrd": 0.9}
    optim, reference = distopt.optim.ClippedAdam(args), pyro.optim.ClippedAdam(args)
    results = []
    for each in (optim, reference):
        grow(each, 1, skips=False)
        p = pyro.get_param_store()._params["017"]
        assert each.optim_objs[p].param_groups[0]["lr"] == pytest.approx(0.01 * 0.9 ** (STEADY + NUM_PARAMS - 1))
        each.optim_objs[p].param_groups[0]["lr"] = 0.5
        step(each, 999)
        results.append({key: p.detach().clone() for key, p in pyro.get_param_store().named_parameters()})
    torch.testing.assert_close(*results)
    assert max(optim.learning_rates()) == pytest.approx(0.45)


def test_the_number_of_groups_of_a_model_that_grows_is_a_logarithm():
    optim = distopt.optim.Adam({"lr": 0.01})
    pyro.clear_param_store()
    most = 0
    for index in range(100):
        appear(index, torch.float32)
        step(optim, index)
        most = max(most, len(groups(optim, PackedGroup)))
    assert most <= 8 + 7
    assert len(list(optim._groups)) == len(groups(optim, PackedGroup))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_only_what_computes_nothing_with_the_count_is_packed_across_counts(dtype):
    assert not staggers(torch.optim.Adam, {"lr": 0.1}, dtype)
    assert staggers(torch.optim.RMSprop, {"lr": 0.1}, dtype)


@pytest.mark.parametrize("way", ["set", "load"])
def test_a_decay_with_the_count_that_was_not_among_the_arguments_is_that_of_each_parameter(way):
    results = []
    for module in (distopt.optim, pyro.optim):
        optim = module.Adagrad({"lr": 0.1})
        grow(optim, 1, skips=False)
        if way == "load":
            states = optim.get_state()
            for state in states.values():
                state["param_groups"][0]["lr_decay"] = 0.5
            optim = module.Adagrad({"lr": 0.1})
            optim.set_state(states)
        else:
            for _, p in pyro.get_param_store().named_parameters():
                optim.optim_objs[p].param_groups[0]["lr_decay"] = 0.5
        for index in range(STEADY):
            step(optim, 500 + index)
        results.append({key: p.detach().clone() for key, p in pyro.get_param_store().named_parameters()})
    torch.testing.assert_close(*results)

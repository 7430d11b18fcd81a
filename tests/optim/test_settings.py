"""Saved state under other hyper-parameters: what was asked for now, and all else as it was."""

from __future__ import annotations

import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import PyroLRScheduler, PyroOptim, by_name
from distopt.optim.settings import revise, settings_of
from distopt.optim.state import optimizer_state
from tests.optim.trajectories import start

STEPS = 7
INNER = [("ConstantLR", {"factor": 0.5}), ("ExponentialLR", {"gamma": 0.9})]
SCHEDULES = {
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 20},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": 30},
    "SequentialLR": {"schedulers": INNER, "milestones": [3]},
    "ChainedScheduler": {"schedulers": INNER},
    "LambdaLR": {"lr_lambda": lambda step: 1 / (1 + step)},
}  # fmt: skip


def scheduled(name, lr, args, optimizer=torch.optim.SGD):
    make = getattr(torch.optim.lr_scheduler, name)
    return PyroLRScheduler(make, {"optimizer": optimizer, "optim_args": {"lr": lr}, **args})


def trained(optim, num_steps=STEPS):
    params = start(count=3)
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optim(params)
        if hasattr(optim, "step"):
            optim.step()
    return params


def revised(before, after, step=STEPS, **how):
    states = before.get_state()
    return revise(states, settings_of(before, states), after, step=step, **how)


def hyper(state):
    return {key: value for key, value in optimizer_state(state)["param_groups"][0].items() if key != "params"}


def test_arguments_that_changed_win_and_moments_stay():
    before = PyroOptim(torch.optim.Adam, {"lr": 0.02, "betas": (0.8, 0.9)})
    trained(before)
    after = PyroOptim(torch.optim.Adam, {"lr": 0.005, "weight_decay": 0.1, "betas": (0.8, 0.9)}, {"global_norm": 1.0})
    states, changes = revised(before, after)
    assert changes == ["lr 0.02 -> 0.005", "weight_decay default -> 0.1", "global_norm none -> 1.0"]
    for name, state in before.get_state().items():
        assert hyper(states[name]) == hyper(state) | {"lr": 0.005, "weight_decay": 0.1}
        for key, value in state["state"][0].items():
            assert torch.equal(states[name]["state"][0][key], value)


def test_nothing_asked_for_leaves_states_as_they_are():
    before = PyroOptim(distopt.optim.clipped_adam.ClippedAdam, {"lr": 0.02, "lrd": 0.9})
    trained(before)
    states, changes = revised(before, PyroOptim(distopt.optim.clipped_adam.ClippedAdam, {"lr": 0.02, "lrd": 0.9}))
    assert changes == []
    assert [hyper(state) for state in states.values()] == [hyper(state) for state in before.get_state().values()]


def test_rate_that_the_optimizer_lets_decay_is_as_if_it_had_begun_at_the_new_one():
    make = distopt.optim.clipped_adam.ClippedAdam
    before, expected = (PyroOptim(make, {"lr": lr, "lrd": 0.9}) for lr in (0.02, 0.4))
    trained(before)
    trained(expected)
    states, _ = revised(before, PyroOptim(make, {"lr": 0.4, "lrd": 0.9}))
    for name, state in expected.get_state().items():
        assert hyper(states[name])["lr"] == pytest.approx(hyper(state)["lr"], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("others", [None, "ExponentialLR", "same"])
def test_schedule_is_where_it_would_be_had_the_run_begun_with_it(name, others):
    """To the bit: from no schedule, from another one, and from the same one with another rate."""
    if others is None:
        before = PyroOptim(torch.optim.SGD, {"lr": 0.1})
    elif others == "same":
        before = scheduled(name, 0.1, SCHEDULES[name])
    else:
        before = scheduled(others, 0.1, {"gamma": 0.8})
    trained(before)
    expected = scheduled(name, 0.3, SCHEDULES[name])
    params = trained(expected)

    after = scheduled(name, 0.3, SCHEDULES[name])
    states, changes = revised(before, after)
    assert "lr 0.1 -> 0.3" in changes
    after.set_state(states)
    for state, reference in zip(states.values(), expected.get_state().values(), strict=True):
        assert hyper(state) == hyper(reference)
    for _ in range(3):
        for optim in (after, expected):
            for param in params:
                param.grad = torch.ones_like(param)
            optim(params)
            optim.step()
        rates = [[hyper(state)["lr"] for state in optim.get_state().values()] for optim in (after, expected)]
        assert rates[0] == rates[1]


def test_schedule_that_is_dropped_leaves_the_rate_that_is_asked_for():
    before = scheduled("OneCycleLR", 0.1, SCHEDULES["OneCycleLR"])
    trained(before)
    after = PyroOptim(torch.optim.SGD, {"lr": 0.1})
    states, changes = revised(before, after)
    assert changes == ["schedule OneCycleLR(max_lr=0.5, total_steps=30) -> none"]
    trained(after)
    after.set_state(states)
    assert all(hyper(state)["lr"] == 0.1 and "max_lr" not in hyper(state) for state in states.values())


def test_schedule_that_follows_the_loss_keeps_what_it_saw_and_takes_new_arguments():
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    make = {"optimizer": torch.optim.SGD}
    before = PyroLRScheduler(plateau, make | {"optim_args": {"lr": 0.1}, "patience": 0, "factor": 0.5, "min_lr": 0.0})
    params = start(count=2)
    for loss in (3.0, 2.0, 2.5, 2.5):
        for param in params:
            param.grad = torch.ones_like(param)
        before(params)
        before.step(loss)
    after = PyroLRScheduler(plateau, make | {"optim_args": {"lr": 0.2}, "patience": 4, "factor": 0.5, "min_lr": 0.01})
    states, _ = revised(before, after)
    for state, old in zip(states.values(), before.get_state().values(), strict=True):
        assert state["scheduler"]["best"] == 2.0
        assert state["scheduler"]["patience"] == 4 and state["scheduler"]["min_lrs"] == [0.01]
        assert hyper(state)["lr"] == 2 * hyper(old)["lr"] == 0.05


def test_new_run_begins_the_schedule_anew():
    before = scheduled("ExponentialLR", 0.1, {"gamma": 0.5})
    trained(before)
    states, changes = revised(before, scheduled("ExponentialLR", 0.1, {"gamma": 0.5}), restarts=True)
    assert changes == []
    assert all(hyper(state)["lr"] == 0.1 and state["scheduler"]["last_epoch"] == 0 for state in states.values())


def test_arguments_by_name_change_for_those_that_they_concern():
    before = PyroOptim(torch.optim.SGD, {"lr": 0.1})
    trained(before)
    states, changes = revised(before, PyroOptim(torch.optim.SGD, by_name({"lr": 0.1}, {"*p1": {"lr": 0.3}})))
    assert changes == ["lr 0.1 -> 0.3 of 1 parameters (net$$$p1)"]
    assert {name: hyper(state)["lr"] for name, state in states.items()} == {
        "net$$$p0": 0.1,
        "net$$$p1": 0.3,
        "net$$$p2": 0.1,
    }


def test_optimizers_of_pyro_are_revised_too():
    before = pyro.optim.Adam({"lr": 0.1})
    trained(before)
    states, changes = revised(before, pyro.optim.Adam({"lr": 0.3}))
    assert changes == ["lr 0.1 -> 0.3"] and all(hyper(state)["lr"] == 0.3 for state in states.values())

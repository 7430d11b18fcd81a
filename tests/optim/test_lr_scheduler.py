"""Schedules of schedules, and schedules of parameters that come late."""

import pyro
import pytest
import torch

from distopt.optim import ChainedScheduler, ExponentialLR, SequentialLR
from distopt.optim.groups import PackedGroup

SPECS = [("ConstantLR", {"factor": 0.5, "total_iters": 3}), (torch.optim.lr_scheduler.ExponentialLR, {"gamma": 0.8})]


def reference(kind, steps):
    p = torch.zeros(3, requires_grad=True)
    optim = torch.optim.SGD([p], lr=1.0, momentum=0.5)
    inner = [
        torch.optim.lr_scheduler.ConstantLR(optim, factor=0.5, total_iters=3),
        torch.optim.lr_scheduler.ExponentialLR(optim, gamma=0.8),
    ]
    if kind == "SequentialLR":
        scheduler = torch.optim.lr_scheduler.SequentialLR(optim, inner, milestones=[4])
    else:
        scheduler = torch.optim.lr_scheduler.ChainedScheduler(inner, optimizer=optim)
    for _ in range(steps):
        p.grad = torch.ones(3)
        optim.step()
        scheduler.step()
    return p.detach()


def make(kind):
    args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0, "momentum": 0.5}, "schedulers": SPECS}
    return SequentialLR({**args, "milestones": [4]}) if kind == "SequentialLR" else ChainedScheduler(args)


@pytest.mark.parametrize("kind", ["SequentialLR", "ChainedScheduler"])
@pytest.mark.parametrize("resumed", [False, True])
def test_schedulers_of_schedulers_follow_torchs(kind, resumed, tmp_path):
    params = [pyro.param(f"x{i}", torch.zeros(3)).unconstrained() for i in range(3)]
    optim = make(kind)
    for t in range(8):
        for p in params:
            p.grad = torch.ones(3)
        if resumed and t == 5:
            optim.save(tmp_path / "state")
            optim = make(kind)
            optim.load(tmp_path / "state")
        optim(params)
        optim.step()
    for p in params:
        torch.testing.assert_close(p.detach(), reference(kind, 8))


@pytest.mark.parametrize("specs", [[], ["ConstantLR"], [("NoSuchLR", {})], [("ConstantLR", 0.5)]])
def test_malformed_specifications_are_refused(specs):
    p = pyro.param("x", torch.zeros(3)).unconstrained()
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="SequentialLR"):
        SequentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "schedulers": specs, "milestones": [4]})(
            [p]
        )


def test_one_schedule_serves_all_parameters_of_one_birth():
    optim = ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5})
    params = [pyro.param(f"x{i}", torch.zeros(3)).unconstrained() for i in range(4)]
    for late in (params[:2], params):
        for p in late:
            p.grad = torch.ones(3)
        optim(late)
        optim.step()
    assert sum(isinstance(g, PackedGroup) for g in optim._groups) == 2
    rates = {name: s["optimizer"]["param_groups"][0]["lr"] for name, s in optim.get_state().items()}
    assert rates == {"x0": 0.25, "x1": 0.25, "x2": 0.5, "x3": 0.5}


def test_scheduler_without_optimizer_is_refused_and_its_arguments_are_left_alone():
    with pytest.raises(ValueError, match="'optimizer'"):
        ExponentialLR({"gamma": 0.9})
    args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    ExponentialLR(args)
    assert set(args) == {"optimizer", "optim_args", "gamma"}

"""Schedules of schedules, and schedules of parameters that come late."""

from functools import partial

import pyro
import pyro.optim
import pytest
import torch

from distopt.optim import ChainedScheduler, ExponentialLR, PyroLRScheduler, SequentialLR
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


Plateau = torch.optim.lr_scheduler.ReduceLROnPlateau


class Built:
    """A callable object without a name or a signature that says what it builds."""

    def __init__(self, constructor):
        self.constructor = constructor

    def __call__(self, *args, **kwargs):
        return self.constructor(*args, **kwargs)


class OnLoss(torch.optim.lr_scheduler.LRScheduler):
    """A schedule of a user's, which must be given a loss."""

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, loss=None, /):
        super().step()


class OnRequiredLoss(OnLoss):
    def _initial_step(self):
        pass

    def step(self, loss, verbose=False):
        pass


CONSTRUCTORS = {
    "class": (Plateau, "metrics"),
    "partial": (partial(Plateau, patience=1), "metrics"),
    "partial of a partial": (partial(partial(Plateau, patience=1), factor=0.5), "metrics"),
    "object": (Built(Plateau), "metrics"),
    "lambda": (lambda optimizer, **kwargs: Plateau(optimizer, **kwargs), "metrics"),
    "subclass": (type("Mine", (Plateau,), {"step": lambda self, *args: Plateau.step(self, *args)}), "metrics"),
    "a loss that is required": (OnRequiredLoss, "loss"),
    "a loss that is not": (OnLoss, None),
    "constant": (partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5), None),
}


@pytest.mark.parametrize("kind", CONSTRUCTORS)
@pytest.mark.parametrize("when", ["before", "loaded", "stepped"])
def test_schedule_itself_is_asked_whether_it_follows_a_metric(kind, when):
    constructor, expected = CONSTRUCTORS[kind]
    args = {"optimizer": Built(torch.optim.SGD), "optim_args": {"lr": 1.0}}
    optim = PyroLRScheduler(constructor, args)
    if when != "before":
        p = pyro.param("x", torch.zeros(3)).unconstrained()
        p.grad = torch.ones(3)
        optim([p])
    if when == "loaded":
        state, optim = optim.get_state(), PyroLRScheduler(constructor, args | {"optim_args": lambda name: {"lr": 1.0}})
        assert optim.metric_name is None  # no schedule can be made yet, and none would be stepped
        optim.set_state(state)
    assert optim.metric_name == expected


def test_scheduler_is_one_of_pyros_too():
    optim = ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5})
    assert isinstance(optim, pyro.optim.PyroLRScheduler)
    assert issubclass(PyroLRScheduler, pyro.optim.PyroLRScheduler)


@pytest.mark.parametrize("gamma", [float("nan"), float("inf"), -float("inf")])
def test_rate_of_a_schedule_that_is_no_finite_number_is_refused_by_its_name(gamma):
    with pytest.raises(ValueError, match="ExponentialLR: gamma is .*expected a finite number"):
        ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": gamma})
    with pytest.raises(ValueError, match="lr is .*expected a finite number"):
        ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": gamma}, "gamma": 0.9})

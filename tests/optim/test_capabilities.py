"""Optimizers that are in no table work in every respect, and those that cannot work are refused."""

import copy
import math
from functools import partial

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import SGD, Adam, ClippedAdam, DistributedOptimizer, PackedState, PyroLRScheduler, PyroOptim
from distopt.optim.capabilities import name_of, switches
from distopt.optim.groups import PackedGroup
from tests.optim.trajectories import Schedule, assert_close, groups, param, run, start


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="closure"):
        PyroOptim(torch.optim.LBFGS, {"lr": 0.1})


@pytest.mark.parametrize("make", [SGD, Adam, ClippedAdam])
def test_nan_learning_rate_is_refused(make):
    with pytest.raises(ValueError, match="lr is nan"):
        make({"lr": math.nan})
    with pytest.raises(ValueError, match="parameter 'x': lr is nan"):
        make(lambda name: {"lr": math.nan})([param()])


class Lookahead(torch.optim.Optimizer):
    """An optimizer of a user's, which no table knows: not elementwise, with state of every kind."""

    def __init__(self, params, lr, every=2, norm=True):
        super().__init__(params, {"lr": lr, "every": every, "norm": norm})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(count=0, slow=p.clone(), history=[], best=None)
                scale = p.grad.norm() + 1.0 if group["norm"] else 1.0
                p -= group["lr"] * p.grad / scale
                state["count"] += 1
                state["history"] = [*state["history"][-1:], float(scale)]
                if state["count"] % group["every"] == 0:
                    state["slow"].lerp_(p, 0.5)
                    p.copy_(state["slow"])
        return loss


def made_by_a_function(params, lr):
    return Lookahead(params, lr, every=3)


CONSTRUCTORS = {
    "class": (Lookahead, {"lr": 0.1}),
    "partial": (partial(Lookahead, every=3), {"lr": 0.1}),
    "partial of torch's": (partial(torch.optim.Adam, betas=(0.5, 0.9)), {"lr": 0.1}),
    "function": (made_by_a_function, {"lr": 0.1}),
    "lambda": (lambda params, **args: Lookahead(params, **args), {"lr": 0.1, "norm": False}),
    "arguments by name": (Lookahead, lambda name: {"lr": 0.5 if name == "net.p3" else 0.1}),
}


@pytest.fixture(params=CONSTRUCTORS)
def constructor_and_args(request):
    return CONSTRUCTORS[request.param]


def test_optimizer_of_the_users_takes_the_steps_that_it_takes_with_pyro(constructor_and_args):
    for seed in range(4):
        schedule = Schedule.random(seed)
        expected, their_state = run(lambda: pyro.optim.PyroOptim(*constructor_and_args), schedule)
        values, state = run(lambda: PyroOptim(*constructor_and_args), schedule)
        assert_close(values, expected)
        assert state.keys() == their_state.keys()
        for name, theirs in their_state.items():
            assert state[name]["param_groups"] == theirs["param_groups"]
            torch.testing.assert_close(state[name]["state"], theirs["state"])


@pytest.mark.parametrize("way", ["by name", "in columns", "file"])
def test_optimizer_of_the_users_resumes_where_it_was(constructor_and_args, way, tmp_path):
    def resume(optim):
        other = PyroOptim(*constructor_and_args)
        if way == "by name":
            other.set_state(optim.get_state())
        elif way == "in columns":
            other.set_packed_state(PackedState.from_states(copy.deepcopy(optim.packed_state().unpack())))
        else:
            optim.save(tmp_path / "state")
            other.load(tmp_path / "state")
        return other

    for seed in range(3):
        schedule = Schedule.random(seed, save_at=6)
        expected, _ = run(lambda: PyroOptim(*constructor_and_args), Schedule.random(seed))
        assert_close(run(lambda: PyroOptim(*constructor_and_args), schedule, resume=resume)[0], expected)


def test_optimizer_of_the_users_is_rolled_back_in_place(constructor_and_args):
    params, optim = start(), PyroOptim(*constructor_and_args)

    def step():
        for p in params:
            p.grad = torch.ones_like(p)
        optim(params)

    step()
    state, values = optim.get_state(), [p.detach().clone() for p in params]
    step()
    expected = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, value in zip(params, values, strict=True):
            p.copy_(value)
    optim.set_state(state)
    step()
    assert_close([p.detach() for p in params], expected)


def test_optimizer_of_the_users_has_a_schedule_clipping_and_other_ranks():
    args = {"optimizer": partial(Lookahead, every=3), "optim_args": {"lr": 0.1}, "gamma": 0.5}
    optim = PyroLRScheduler(partial(torch.optim.lr_scheduler.ExponentialLR, last_epoch=-1), args, {"clip_norm": 0.1})
    distributed = DistributedOptimizer(optim)
    p = param(gradient=5.0)
    distributed([p])
    distributed.step()
    assert p.grad.norm() == pytest.approx(0.1, rel=1e-4)
    assert optim.get_state()["x"]["optimizer"]["param_groups"][0]["lr"] == 0.05
    with pytest.raises(AttributeError, match="Lookahead"):
        _ = DistributedOptimizer(PyroOptim(partial(Lookahead, every=3), {"lr": 0.1})).step


def test_state_of_another_optimizer_is_refused_by_the_name_of_the_users():
    p, optim = param(), PyroOptim(partial(Lookahead, every=3), {"lr": 0.1})
    optim([p])
    other = SGD({"lr": 0.1, "momentum": 0.9})
    other([p])
    with pytest.raises(ValueError, match="'x'.*momentum.*Lookahead has not"):
        optim.set_state(other.get_state())


def test_optimizer_may_keep_state_that_belongs_to_no_parameter():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.state["calls"]["count"] = self.state["calls"].get("count", 0) + 1
            return super().step(closure)

    p, optim = param(), PyroOptim(Counting, {"lr": 0.1, "momentum": 0.9})
    optim([p])
    resumed = PyroOptim(Counting, {"lr": 0.1, "momentum": 0.9})
    resumed.set_state(optim.get_state())
    resumed([p])
    assert resumed.get_state()["x"]["state"]["calls"] == {"count": 2}
    assert resumed.packed_state().unpack()["x"]["state"]["calls"] == {"count": 2}


def test_partial_of_an_optimizer_that_packs_packs_too():
    params, optim = start(), PyroOptim(partial(torch.optim.Adam, amsgrad=True), {"lr": 0.1})
    for p in params:
        p.grad = torch.ones_like(p)
    optim(params)
    (group,) = groups(optim, PackedGroup)
    assert len(group.members) == len(params)
    assert optim.get_state()["net$$$p0"]["param_groups"][0]["amsgrad"] is True


def test_arguments_override_those_of_a_partial():
    p, optim = param(), PyroOptim(partial(torch.optim.SGD, lr=5.0, momentum=0.5), {"lr": 0.1})
    optim([p])
    group = optim.get_state()["x"]["param_groups"][0]
    assert (group["lr"], group["momentum"]) == (0.1, 0.5)
    assert name_of(optim.pt_optim_constructor) == "SGD"


def test_subclass_of_an_optimizer_that_packs_is_given_each_parameter_by_itself():
    seen = []

    class Watching(torch.optim.Adam):
        def step(self, closure=None):
            seen.append([tuple(p.shape) for group in self.param_groups for p in group["params"]])
            return super().step(closure)

    optim = PyroOptim(Watching, {"lr": 0.1})
    optim([param("a", 2), param("b", 3)])
    assert seen == [[(2,)], [(3,)]]


@pytest.mark.parametrize(
    ("constructor", "error", "message"),
    [
        (lambda params, **args: torch.optim.LBFGS(params, **args), ValueError, "closure"),
        (lambda params, **args: None, TypeError, "optim_constructor returned None, expected a torch.optim.Optimizer"),
    ],
)
def test_what_a_function_builds_is_checked_before_it_steps(constructor, error, message):
    with pytest.raises(error, match=message):
        PyroOptim(constructor, {"lr": 0.1})([param()])


class Wrapping(torch.optim.Optimizer):
    """An optimizer around another one, which it keeps where schedules keep theirs."""

    def __init__(self, params, lr):
        params = list(params)
        self.optimizer = torch.optim.SGD(params, lr=lr)
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        self.optimizer.step()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(2.0)


@pytest.mark.parametrize("module", [distopt.optim, pyro.optim])
def test_optimizer_around_another_one_is_stepped_itself(module):
    p = param()
    p.grad = torch.ones_like(p)
    expected = 2 * (p.detach() - 0.5)
    module.PyroOptim(Wrapping, {"lr": 0.5})([p])
    assert torch.equal(p.detach(), expected)


@pytest.mark.parametrize("name", sorted({"Muon", "Adafactor", "SGD"} & set(vars(torch.optim))))
@pytest.mark.parametrize("scheduled", [False, True])
def test_state_is_checked_by_an_optimizer_of_the_parameter_itself(name, scheduled):
    """Muon, for one, refuses parameters of one dimension, and so an optimizer of any other tensor on trial."""

    def make():
        constructor, args = getattr(torch.optim, name), {"lr": 0.1}
        if not scheduled:
            return PyroOptim(constructor, args)
        return distopt.optim.ExponentialLR({"optimizer": constructor, "optim_args": args, "gamma": 0.5})

    def step(optim, p):
        p.grad = torch.ones_like(p)
        optim([p])

    p, optim = pyro.param("x", torch.ones(3, 2)), make()
    step(optim, p)
    state, value = optim.get_state(), p.detach().clone()
    if scheduled:
        optim.step()
    step(optim, p)
    pyro.clear_param_store()
    q, other = pyro.param("x", value), make()
    other.set_state(state)
    if scheduled:
        other.step()
    step(other, q)
    assert torch.equal(q, p)


@pytest.mark.parametrize(
    "constructor", [partial(torch.optim.LBFGS, max_iter=3), type("Mine", (torch.optim.LBFGS,), {})]
)
def test_lbfgs_is_refused_in_any_wrapping(constructor):
    with pytest.raises(ValueError, match="closure"):
        PyroOptim(constructor, {"lr": 0.1})


def test_switches_are_left_to_users_who_choose():
    adam, f32 = torch.optim.Adam, torch.float32
    assert switches(adam, {}, f32, "cpu", listed=False) == {}  # distopt's kernel, or the plain loop
    assert switches(torch.optim.SGD, {}, f32, "cpu", listed=False) == {"fused": True}
    assert switches(adam, {}, torch.complex64, "cpu", listed=False) == {}
    assert switches(adam, {"foreach": True}, f32, "cpu", listed=True) == {}
    assert switches(adam, {"capturable": True}, f32, "cuda", listed=True) == {}
    assert switches(torch.optim.Adamax, {}, f32, "cpu", listed=True) == {"foreach": True}
    assert switches(torch.optim.Adamax, {}, f32, "cpu", listed=False) == {}
    assert switches(Lookahead, {}, f32, "cpu", listed=True) == {}

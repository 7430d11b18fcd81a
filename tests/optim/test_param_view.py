"""What users of pyro.optim look at between two steps is what they find there: gradients, state, state dicts."""

from __future__ import annotations

import copy
import random

import pyro
import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import SGD, Adam
from distopt.optim.groups import PackedGroup
from tests.optim.trajectories import groups, param, stepped

OPTIMIZERS = [
    ("Adam", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.01}),
    ("RMSprop", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1}),
]
SHAPES = [(), (1,), (3, 2), (40,), (40_000,)]  # the last one is never packed
CLIPS = [{"clip_norm": 0.5}, {"clip_value": 0.2}, {"clip_norm": 0.5, "clip_value": 0.2}, {"clip_norm": 1e9}]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def gradients(params, step):
    """Sets gradients of very different sizes, one of them zero."""
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + index)
        p.grad = (torch.randn(p.shape, generator=generator) * 10.0 ** (index - 2)).to(p.dtype)
    params[1].grad.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize(("name", "args"), OPTIMIZERS, ids=lambda each: each if isinstance(each, str) else "")
def test_gradients_after_a_call_are_clipped_in_place_as_by_pyro(name, args, clip, dtype):
    theirs, ours = parameters(dtype), parameters(dtype)
    pyro_optim, optim = getattr(pyro.optim, name)(dict(args), clip), getattr(distopt.optim, name)(dict(args), clip)
    for step in range(3):
        gradients(theirs, step)
        gradients(ours, step)
        kept = [p.grad for p in ours]
        pyro_optim(theirs)
        optim(ours)
        for their, our, gradient in zip(theirs, ours, kept, strict=True):
            assert our.grad is gradient, "clipped in place"
            torch.testing.assert_close(our.grad, their.grad)
            torch.testing.assert_close(our, their)


def test_gradients_after_a_call_are_clipped_by_the_global_norm():
    params = parameters()
    gradients(params, 0)
    before = torch.stack([p.grad.norm() for p in params]).norm()
    distopt.optim.SGD({"lr": 0.1}, {"global_norm": 1.0})(params)
    after = torch.stack([p.grad.norm() for p in params]).norm()
    assert before > 1.0
    assert after == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loop_that_clears_gradients_through_the_optimizers_steps_by_each_gradient_once(set_to_none):
    theirs, ours = parameters(), parameters()
    pyro_optim, optim = pyro.optim.SGD({"lr": 0.1}), distopt.optim.SGD({"lr": 0.1})
    for _ in range(4):
        for params, each in ((theirs, pyro_optim), (ours, optim)):
            sum(p.square().sum() for p in params).backward()
            each(params)
            for p in params:
                each.optim_objs[p].zero_grad(set_to_none=set_to_none)
                assert p.grad is None if set_to_none else not p.grad.any()
    for their, our in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize(("name", "args"), OPTIMIZERS, ids=lambda each: each if isinstance(each, str) else "")
def test_optimizer_of_a_parameter_shows_its_state_alone(name, args):
    theirs, ours = parameters(), parameters()
    pyro_optim, optim = getattr(pyro.optim, name)(dict(args)), getattr(distopt.optim, name)(dict(args))
    for step in range(2):
        gradients(theirs, step)
        gradients(ours, step)
        pyro_optim(theirs)
        optim(ours)
    for their, our in zip(theirs, ours, strict=True):
        expected, view = pyro_optim.optim_objs[their], optim.optim_objs[our]
        assert isinstance(view, type(expected))
        assert list(view.state) == [our]
        assert view.state[our].keys() == expected.state[their].keys()
        for key, value in expected.state[their].items():
            torch.testing.assert_close(torch.as_tensor(view.state[our][key]), torch.as_tensor(value))
        assert view.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
        theirs_dict, ours_dict = expected.state_dict(), view.state_dict()
        assert ours_dict["param_groups"] == theirs_dict["param_groups"]
        assert ours_dict["state"].keys() == theirs_dict["state"].keys()


def test_state_of_a_packed_parameter_is_the_optimizers_memory():
    params = parameters()[:4]
    optim = distopt.optim.Adam({"lr": 0.1})
    gradients(params, 0)
    optim(params)
    optim.optim_objs[params[2]].state[params[2]]["exp_avg"].fill_(7.0)
    states = optim.get_state()
    averages = [next(iter(state["state"].values()))["exp_avg"] for state in states.values()]
    assert sum(bool((average == 7.0).all()) for average in averages) == 1


def test_scheduler_of_a_parameter_has_an_optimizer_of_its_own():
    x, y = (torch.ones(2, requires_grad=True) for _ in "xy")
    args = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    optim = distopt.optim.ExponentialLR(args)
    for _ in range(2):
        (x.sum() + y.sum()).backward()
        optim([x, y])
        optim.optim_objs[x].optimizer.zero_grad()
        optim.step()
    assert x.grad is None and torch.equal(y.grad, torch.full((2,), 2.0))
    view = optim.optim_objs[y]
    assert isinstance(view, torch.optim.lr_scheduler.ExponentialLR)
    assert view.get_last_lr() == [0.025]
    assert view.optimizer.state_dict()["param_groups"][0]["lr"] == 0.025
    assert list(view.optimizer.state) == [y]


def test_step_and_load_of_one_parameter_are_refused_and_the_message_says_what_to_call():
    params = [pyro.param(name, torch.ones(2)) for name in "ab"]
    optim = distopt.optim.Adam({"lr": 0.1})
    for p in params:
        p.grad = torch.ones(2)
    optim(params)
    with pytest.raises(TypeError, match=r"'a'.*calling the optimizer"):
        optim.optim_objs[params[0]].step()
    with pytest.raises(TypeError, match=r"set_state\(\{'a': state\}\)"):
        optim.optim_objs[params[0]].load_state_dict({})


# Whole scripts that write through `optim_objs`, against the same scripts over pyro.optim.

EDITED = [
    ("SGD", {"lr": 0.5, "momentum": 0.5}, "lr"),
    ("Adam", {"lr": 0.5, "weight_decay": 0.1}, "lr"),
    ("ClippedAdam", {"lr": 0.5, "lrd": 0.9, "clip_norm": 0.5}, "lr"),
    ("AdagradRMSProp", {"eta": 0.5}, "eta"),
    ("RMSprop", {"lr": 0.1}, "lr"),
    ("ExponentialLR", {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.5, "momentum": 0.5}, "gamma": 0.5}, "lr"),
]


def hyper(optim, p):
    optimizer = optim.optim_objs[p]
    return getattr(optimizer, "optimizer", optimizer).param_groups[0]


def edit(optim, params, rate, r):
    """One thing that scripts do, chosen at random; returns what they read."""
    one = params[r.randrange(len(params))]
    match r.randrange(8):
        case 0:
            hyper(optim, one)[rate] = 0.25
        case 1:
            for p in optim.optim_objs:
                hyper(optim, p)[rate] *= 0.5
        case 2:
            for p in params[::2]:
                hyper(optim, p).update({rate: 0.125})
        case 3:
            del optim.optim_objs[one]
        case 4:
            optim.optim_objs.clear()
            optim.grad_clip.clear()
        case 5:
            optim.optim_objs.pop(one)
        case 6 if "weight_decay" in hyper(optim, one):
            hyper(optim, one)["weight_decay"] = 0.5
        case 7 if hasattr(optim, "step"):
            optim.step()
    return [float(hyper(optim, p)[rate]) for p in params if p in optim.optim_objs]


@pytest.mark.parametrize(("name", "args", "rate"), EDITED, ids=[name for name, *_ in EDITED])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_set_and_removed_through_optim_objs_holds_as_with_pyro(name, args, rate, seed):
    def run(module):
        pyro.clear_param_store()
        params = [pyro.param(f"p{i}", torch.full((3,), float(i))) for i in range(6)]
        optim, r, log = getattr(module, name)(copy.deepcopy(args)), random.Random(seed), []
        for step in range(20):
            chosen = params if step % 3 else params[: 3 + step % 4]
            for p in chosen:
                p.grad = torch.linspace(-1.0, 2.0, 3) + step % 5
            optim(chosen)
            if step % 2:
                log.append(edit(optim, chosen, rate, r))
            log += [p.tolist() for p in params]
        return log

    torch.testing.assert_close(run(distopt.optim), run(pyro.optim), rtol=1e-5, atol=1e-6)


def test_all_rates_halved_in_a_loop_leave_all_in_one_group_and_one_that_differs_leaves_alone():
    params = [param(f"x{i}") for i in range(20)]
    optim = stepped(params, Adam({"lr": 0.1}))
    (group,) = groups(optim, PackedGroup)
    for p in params:
        optim.optim_objs[p].param_groups[0]["lr"] *= 0.5
    stepped(params, optim)
    assert groups(optim, PackedGroup) == [group] and group.hyper_of(group.members[0])["lr"] == 0.05
    optim.optim_objs[params[3]].param_groups[0]["lr"] = 1.0
    assert optim.get_state()["x3"]["param_groups"][0]["lr"] == 1.0
    assert optim.packed_state().unpack()["x4"]["param_groups"][0]["lr"] == 0.05
    assert sorted(len(g.members) for g in groups(optim, PackedGroup)) == [1, 19]


def test_limits_that_are_removed_are_read_anew():
    params = [param(f"x{i}") for i in range(3)]
    optim = stepped(params, SGD({"lr": 1.0}, {"clip_norm": 0.5}))
    assert [callable(each) for each in optim.grad_clip.values()] == [True] * 3
    optim.pt_clip_args = {}
    optim.grad_clip.clear()
    assert list(optim.grad_clip.values()) == [None] * 3
    before = params[0].detach().clone()
    stepped(params, optim)
    torch.testing.assert_close(before - params[0].detach(), torch.ones_like(before))


@pytest.mark.parametrize(
    "write",
    [
        lambda optim, p: optim.optim_objs[p].state.clear(),
        lambda optim, p: optim.optim_objs[p].state.update({p: {}}),
        lambda optim, p: optim.optim_objs[p].state[p].update(step=0),
        lambda optim, p: optim.optim_objs[p].state[p].pop("step"),
        lambda optim, p: optim.optim_objs[p].param_groups[0].pop("lr"),
        lambda optim, p: optim.optim_objs.update({p: torch.optim.SGD([p], lr=1.0)}),
        lambda optim, p: optim.grad_clip.update({p: None}),
        lambda optim, p: optim.optim_objs[p].param_groups[0].update(params=[]),
    ],
)
def test_what_cannot_be_written_is_refused_and_never_ignored(write):
    p = param()
    optim = stepped([p], Adam({"lr": 0.1}))
    state = optim.get_state()
    with pytest.raises(TypeError, match="optim_objs|grad_clip"):
        write(optim, p)
    assert str(optim.get_state()) == str(state)


@pytest.mark.parametrize("write", [torch.Tensor.zero_, lambda step: step.add_(1)])
@pytest.mark.parametrize("name", ["Adam", "RMSprop", "ASGD", "NAdam", "RAdam", "Adamax"])
def test_number_that_a_group_shares_is_changed_for_one_parameter_or_refused(name, write):
    params = [param("x"), param("y")]
    optim = stepped(params, getattr(distopt.optim, name)({"lr": 0.1}))
    state = optim.optim_objs[params[0]].state[params[0]]
    numbers = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() == 0]
    assert numbers
    for key in numbers:
        try:
            write(state[key])
        except RuntimeError as error:
            assert "nplace update" in str(error)
        else:
            seen = optim.optim_objs[params[0]].state[params[0]][key]
            assert seen == state[key]
    copy.deepcopy(optim.optim_objs[params[0]].state_dict())["state"][0]["step"].add_(1)


def test_state_that_a_parameter_does_not_have_is_a_key_error_as_with_torch():
    p, fresh = param("x"), param("y")
    optim = stepped([p, fresh], SGD({"lr": 1.0}))
    view = optim.optim_objs[p]
    assert view.state[fresh] == {}
    with pytest.raises(KeyError):
        view.state[p]["momentum_buffer"]


def test_schedule_of_one_parameter_cannot_be_stepped_or_changed():
    params = [param("x"), param("y")]
    args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    optim = stepped(params, distopt.optim.ExponentialLR(args))
    acts = (lambda view: view.step(), lambda view: setattr(view, "gamma", 0.1), lambda view: view.load_state_dict({}))
    for act in acts:
        with pytest.raises(TypeError, match="optim_objs"):
            act(optim.optim_objs[params[0]])


@pytest.mark.parametrize(("name", "args"), OPTIMIZERS, ids=lambda each: each if isinstance(each, str) else "")
def test_popitem_takes_the_parameter_that_it_takes_in_pyro(name, args):
    theirs, ours = parameters(), parameters()
    pyro_optim, optim = getattr(pyro.optim, name)(dict(args)), getattr(distopt.optim, name)(dict(args))
    for params, each in ((theirs, pyro_optim), (ours, optim)):
        gradients(params, 0)
        each(params)
    for their, our in zip(reversed(theirs), reversed(ours), strict=True):
        assert pyro_optim.optim_objs.popitem()[0] is their
        assert optim.optim_objs.popitem()[0] is our
    with pytest.raises(KeyError):
        optim.optim_objs.popitem()

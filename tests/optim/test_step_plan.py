"""A call is planned once, and again when anything about it has changed."""

import math

import pyro
import pytest
import torch

import distopt.optim
from distopt.optim import SGD, Adam, FlatGradients
from distopt.optim.grouping import Grouping
from distopt.optim.groups import PackedGroup
from distopt.optim.step_plan import Planner, all_finite
from tests.optim.trajectories import flat_gradients, groups, reference, start, stepped

pytestmark = pytest.mark.usefixtures("loops")


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
            new = flat_gradients(chosen[:-1])
            flat = new if flat is None or len(flat.params) != len(new.params) else flat._replace(buffer=new.buffer)
            p = chosen[-1]
            optim.clip_and_step([flat], [(pyro.get_param_store().param_name(p), p, p.grad.clone())])
        return [p.detach().clone() for p in params]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


def test_handed_over_buffer_of_a_whole_group_is_stepped_without_a_copy():
    params = start()
    values = [p.detach().clone() for p in params]
    optim = stepped(params)
    flat = flat_gradients(params)
    flat.buffer.fill_(1.0)
    (group,) = groups(optim, PackedGroup)
    optim.clip_and_step([flat])
    assert group.arena.flat.grad.data_ptr() == flat.buffer.data_ptr()
    torch.testing.assert_close([p.detach() for p in params], reference(values, 2))


def plans(optim):
    return list(optim._planner._plans)


def test_equal_calls_use_one_plan_whatever_the_container():
    params = start()
    optim = stepped(params)
    (plan,) = plans(optim)
    stepped(params, optim)
    stepped(tuple(params), optim)
    assert plans(optim) == [plan]


def test_calls_of_two_kinds_that_alternate_keep_their_plans():
    params = start()
    optim = Adam({"lr": 0.1})
    for _ in range(2):
        stepped(params[:4], optim)
        stepped(params[4:], optim)
    before = plans(optim)
    for _ in range(3):
        stepped(params[:4], optim)
        stepped(params[4:], optim)
    assert set(map(id, plans(optim))) == set(map(id, before))
    assert len(before) == 2


def test_plans_of_ever_new_calls_are_not_kept():
    params = start()
    optim = stepped(params)
    for i in range(20):
        stepped(params[i % 8 :] + params[: i % 8], optim)
    assert len(plans(optim)) <= 4


@pytest.mark.parametrize("change", ["no gradient", "sparse", "moved"])
@pytest.mark.parametrize("numel", [3, 40_000], ids=["packed", "listed"])
def test_call_is_planned_anew_when_a_parameter_has_changed(change, numel):
    values = [torch.zeros(numel), torch.ones(numel)]
    params = [pyro.param(f"x{i}", v.clone()).unconstrained() for i, v in enumerate(values)]
    optim = SGD({"lr": 0.1, "momentum": 0.9})
    twins = [v.clone().requires_grad_() for v in values]
    twin_optim = torch.optim.SGD(twins, lr=0.1, momentum=0.9)
    for t in range(4):
        for p in (*params, *twins):
            p.grad = torch.full((numel,), 1.0 + t)
        if t == 2 and change == "no gradient":
            params[0].grad = twins[0].grad = None
        elif t == 2 and change == "sparse":
            params[0].grad, twins[0].grad = params[0].grad.to_sparse(), twins[0].grad.to_sparse()
        elif t == 2:
            params[0].data = params[0].detach().clone()
        optim(params)
        twin_optim.step()
    torch.testing.assert_close([p.detach() for p in params], [p.detach() for p in twins])


def test_parameters_with_other_global_norms_are_clipped_by_their_own():
    params = [pyro.param(name, torch.zeros(2)).unconstrained() for name in "abc"]
    limits = {"a": {"global_norm": 1.0}, "b": {"global_norm": 2.0}, "c": {}}
    for p in params:
        p.grad = torch.full((2,), 10.0)
    SGD({"lr": 1.0}, limits.__getitem__)(params)
    norms = [float(p.detach().norm()) for p in params]
    assert norms == pytest.approx([1.0, 2.0, math.sqrt(200.0)], rel=1e-5)


def test_gradients_in_one_buffer_but_another_order_are_gathered():
    params = start(torch.float64)
    optim, expected = stepped(params), reference([p.detach() for p in start(torch.float64)], 2)
    params = list(dict(pyro.get_param_store().named_parameters()).values())
    optim = stepped(params)
    flat = flat_gradients(params[::-1])
    optim.clip_and_step([flat])
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_every_element_of_every_tensor_must_be_finite():
    good, bad = torch.zeros(3), torch.tensor([0.0, math.inf])
    assert all_finite([]) and all_finite([good, good.to_sparse()])
    assert not all_finite([good, bad])
    assert not all_finite([good, bad.to_sparse()])
    assert not all_finite([torch.tensor([complex(0.0, math.nan)])])


@pytest.mark.parametrize("name", ["Adam", "SGD", "ClippedAdam"])
def test_no_bit_follows_from_the_order_in_which_gradients_come(name):
    """Pyro hands over sets, whose order follows from addresses; a vector register rounds as its rest does not."""

    def run(order):
        optim = getattr(distopt.optim, name)({"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})})
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(1 + 7 * i % 11, generator=generator).requires_grad_() for i in range(12)]
        for _ in range(20):
            handed = [(f"p{i:02}", p, torch.randn(p.shape, generator=generator)) for i, p in enumerate(params)]
            optim.clip_and_step((), [handed[i] for i in order])
        return torch.cat([p.detach() for p in params])

    expected = run(range(12))
    for seed in range(4):
        assert torch.equal(run(torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()), expected)


GROWING = {
    "Adam": ({"lr": 0.1}, {"global_norm": 1.0}),
    "ClippedAdam": ({"lr": 0.1, "lrd": 0.97}, {"clip_norm": 0.3}),
    "SGD": ({"lr": 0.1, "momentum": 0.9}, {}),
    "NAdam": ({"lr": 0.1}, {}),  # which is not packed across step counts
}


def _grow_by_handing_over(kind, numel, num_buffers, num_calls=40):
    """Returns the values after calls with one to three new parameters, in no order of names, and how it was planned."""
    pyro.clear_param_store()
    optim = getattr(distopt.optim, kind)(*GROWING[kind])
    generator = torch.Generator().manual_seed(0)
    in_order: list[tuple[str, torch.Tensor]] = []
    flats: list[FlatGradients] = []
    for call in range(num_calls):
        new = range(call, call + 1 + call % 3) if call < num_calls - 5 else ()
        for index in new:  # behind those before, as an extended layout has them
            name = f"{(10 * call + index) * 7919 % 100_003:06d}"
            in_order.append((name, pyro.param(name, torch.ones(1 + index % numel)).unconstrained()))
        if new:
            buffers = [in_order[first::num_buffers] for first in range(num_buffers)]
            flats = [FlatGradients(*zip(*named, strict=True), torch.empty(0)) for named in buffers if named]
        numels = [flat.offsets()[-1] for flat in flats]
        flats = [f._replace(buffer=torch.randn(n, generator=generator)) for f, n in zip(flats, numels, strict=True)]
        optim.clip_and_step(flats)
    return {key: p.detach().clone() for key, p in sorted(pyro.get_param_store().named_parameters())}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize(("numel", "num_buffers"), [(3, 1), (600, 1), (3, 2)])
def test_plan_that_is_extended_by_new_parameters_steps_bit_by_bit_as_a_new_one(name, numel, num_buffers, monkeypatch):
    num_arranged = 0
    arrange = Grouping.arrange

    def counted(*args):
        nonlocal num_arranged
        num_arranged += 1
        return arrange(*args)

    monkeypatch.setattr(Grouping, "arrange", counted)
    extended = _grow_by_handing_over(name, numel, num_buffers)
    if name != "NAdam":
        assert num_arranged < 20, "what a call costs besides its step must follow from what is new"
    monkeypatch.setattr(Planner, "_extended_plan", lambda *_: None)
    planned = _grow_by_handing_over(name, numel, num_buffers)
    assert extended.keys() == planned.keys()
    assert all(torch.equal(extended[key], planned[key]) for key in planned)


def test_parameter_that_returns_while_a_model_grows_resumes_with_its_state():
    """Not all that seem new to a plan are new to the optimizer."""
    results = []
    for hands_over in (True, False):
        params = start(torch.float64)
        optim = Adam({"lr": 0.1})
        optim.set_state(stepped(params).get_state())
        for count in (3, 4, 5, 8, 6, 8, 8):
            chosen = params[:count]
            for p in chosen:
                p.grad = torch.full_like(p, count)
            optim.clip_and_step([flat_gradients(chosen)]) if hands_over else optim(chosen)
        results.append([p.detach().clone() for p in params])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)

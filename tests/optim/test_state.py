"""State is loaded into the optimizer that wrote it, or refused before anything changes; and what states must share."""

import pyro
import pytest
import torch

from distopt.optim import SGD, Adam, ExponentialLR
from distopt.optim.state import (
    copied,
    flat_state,
    frozen,
    hyper_key,
    list_state,
    load_into,
    packing_key,
    state_dict_of,
    state_of_one,
)
from tests.optim.trajectories import param


def test_state_of_another_optimizer_is_refused_and_nothing_changes():
    p, optim, other = param(), Adam({"lr": 0.1}), SGD({"lr": 0.1, "momentum": 0.9})
    optim([p])
    other([p])
    for target in (optim, Adam({"lr": 0.1})):
        target.set_state({}) if target is optim else None
        with pytest.raises(ValueError, match="'x'.*another optimizer.*momentum"):
            target.set_state(other.get_state())
            target([p])
    assert optim.get_state()["x"]["state"][0]["step"] == 1


def test_state_of_another_shape_is_refused():
    p, optim = param(), Adam({"lr": 0.1})
    optim([p])
    state = optim.get_state()
    pyro.clear_param_store()
    fresh = Adam({"lr": 0.1})
    fresh.set_state(state)
    with pytest.raises(ValueError, match=r"'x': exp_avg.*\(3,\).*\(5,\)"):
        fresh([param(size=5)])


def test_state_with_a_scheduler_is_refused_without_one():
    scheduled = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    p, optim = param(), Adam({"lr": 0.1})
    scheduled([p])
    optim([p])
    with pytest.raises(ValueError, match="a scheduler"):
        optim.set_state(scheduled.get_state())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({None: {}}, "name None"),
        ({"x": {"weights": 1}}, "no torch state dict"),
        ({"x": {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}}}, "only one of"),
        ({"x": {"state": {}, "param_groups": [{"params": [0, 1]}]}}, "several parameters"),
    ],
)
def test_malformed_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        Adam({"lr": 0.1}).set_state(state)


def adam_state(values, steps=1, lr=0.1):
    """The state of a parameter that torch's Adam has stepped by ones."""
    p = torch.tensor(values, requires_grad=True)
    optim = torch.optim.Adam([p], lr=lr)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optim.step()
    return optim.state_dict()


def test_copy_of_nested_state_shares_no_tensor_or_only_tensors():
    state = adam_state([1.0, 2.0])
    copy, shallow = copied(state), copied(state, tensors=False)
    assert shallow["state"][0]["exp_avg"] is state["state"][0]["exp_avg"]
    state["state"][0]["exp_avg"].zero_()
    state["param_groups"][0]["lr"] = 7.0
    assert copy["state"][0]["exp_avg"].tolist() == pytest.approx([0.1, 0.1])
    assert copy["param_groups"][0]["lr"] == shallow["param_groups"][0]["lr"] == 0.1


def test_equal_values_freeze_to_equal_keys():
    assert frozen({"a": [1, (2.0, None)], "b": torch.tensor(3.0)}) == frozen(
        {"b": torch.tensor(3.0), "a": [1, (2.0, None)]}
    )
    assert frozen(1) != frozen(1.0) != frozen(True)
    assert frozen(torch.zeros(2)) != frozen(torch.zeros(2))  # tensors of several elements count by identity
    assert hash(frozen([set()])) is not None


def test_kernel_switches_are_no_hyper_parameters():
    group = adam_state([1.0])["param_groups"][0]
    assert hyper_key(group) == hyper_key(group | {"fused": True, "foreach": None, "params": [3]})
    assert hyper_key(group) != hyper_key(group | {"lr": 0.2})


def test_states_pack_if_all_but_their_elements_is_equal():
    state = adam_state([1.0, 2.0])
    assert packing_key(state, 2) == packing_key(adam_state([[3.0], [4.0]]), 2)
    assert packing_key(state, 2) != packing_key(adam_state([1.0, 2.0], steps=2), 2)
    assert packing_key(state, 2) != packing_key(adam_state([1.0, 2.0], lr=0.2), 2)
    assert packing_key(state, 3) is None  # its moments are not of the parameter's size
    assert packing_key(None, 2) == "new"


def test_flat_state_steps_packed_parameters_as_theirs_steps_each():
    values = [[1.0, 2.0], [3.0]]
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    optim = torch.optim.Adam([flat], lr=0.1)
    load_into(optim, flat_state([adam_state(v, steps=2) for v in values]))
    state = optim.state_dict()["state"][0]
    assert state["step"] == 2
    expected = torch.cat([adam_state(v, steps=2)["state"][0]["exp_avg"] for v in values])
    torch.testing.assert_close(state["exp_avg"], expected)


@pytest.mark.parametrize("separate", [False, True])
def test_list_state_keeps_the_steps_of_each_parameter(separate):
    states = [adam_state([1.0], steps=2), adam_state([2.0, 3.0], steps=5)]
    params = [torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)]
    optim = torch.optim.Adam([{"params": [p]} for p in params] if separate else params, lr=0.5)
    load_into(optim, list_state(states, separate=separate))
    assert [int(optim.state[p]["step"]) for p in params] == [2, 5]
    assert [group["lr"] for group in optim.param_groups] == [0.1] * (1 + separate)


def test_schedule_is_loaded_before_the_optimizer_whose_rate_it_would_set_anew():
    def make():
        sgd = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        return torch.optim.lr_scheduler.ExponentialLR(sgd, gamma=0.5)

    first, second = make(), make()
    first.optimizer.step()
    first.step()
    load_into(second, state_dict_of(first))
    assert second.optimizer.param_groups[0]["lr"] == 0.5
    assert second.last_epoch == 1


def test_state_of_a_parameter_that_was_not_stepped_is_empty():
    assert state_of_one({"lr": 0.1}, {}) == {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}

"""What pyro.optim gets wrong, and input that is wrong: each a clear error or the right behaviour."""

import math

import pyro
import pytest
import torch

from distopt.optim import SGD, Adam, ClippedAdam, ExponentialLR, FlatGradients, PyroOptim


def param(name="x", size=3, gradient=1.0):
    p = pyro.param(name, torch.zeros(size)).unconstrained()
    p.grad = torch.full_like(p, gradient)
    return p


def value(name="x"):
    return pyro.param(name).detach().clone()


def test_set_state_on_seen_parameters_rolls_back_at_once():
    p, optim = param(), Adam({"lr": 0.1})
    optim([p])
    before, at = optim.get_state(), value()
    optim([p])
    after = value()
    optim.set_state(before)
    with torch.no_grad():
        p.copy_(at)
    optim([p])
    assert torch.equal(value(), after)
    assert optim.get_state()["x"]["state"][0]["step"] == 2


def test_set_state_of_one_of_many_leaves_the_others():
    ps, optim = [param(f"x{i}") for i in range(4)], Adam({"lr": 0.1})
    optim(ps)
    first = optim.get_state()
    optim(ps)
    optim.set_state({"x1": first["x1"]})
    steps = {name: int(s["state"][0]["step"]) for name, s in optim.get_state().items()}
    assert steps == {"x0": 2, "x1": 1, "x2": 2, "x3": 2}


def test_state_that_waits_for_its_parameter_is_kept_on_save(tmp_path):
    p, optim = param(), Adam({"lr": 0.1})
    optim([p])
    optim.save(tmp_path / "one")
    second = Adam({"lr": 0.1})
    second.load(tmp_path / "one")
    second([param("y")])
    second.save(tmp_path / "two")
    third = Adam({"lr": 0.1})
    third.load(tmp_path / "two")
    assert set(third.get_state()) == {"x", "y"}
    third([p])
    assert third.get_state()["x"]["state"][0]["step"] == 2


def test_names_are_kept_after_the_store_is_cleared():
    ps, optim = [param("a"), param("b")], Adam({"lr": 0.1})
    optim(ps)
    pyro.clear_param_store()
    assert set(optim.get_state()) == {"a", "b"}


def test_parameter_deleted_from_the_store_leaves_the_optimizer():
    optim = Adam({"lr": 0.1})
    optim([param("a"), param("b")])
    del pyro.get_param_store()["b"]
    optim([pyro.param("a").unconstrained()])
    assert set(optim.get_state()) == {"a"}


def test_parameter_replaced_in_the_store_starts_a_new_life():
    optim = Adam({"lr": 0.1})
    optim([param("a"), param("b")])
    pyro.get_param_store()["b"] = torch.ones(3)
    p = pyro.param("b").unconstrained()
    p.grad = torch.ones(3)
    optim([pyro.param("a").unconstrained(), p])
    steps = {name: int(s["state"][0]["step"]) for name, s in optim.get_state().items()}
    assert steps == {"a": 2, "b": 1}


def test_no_tensor_is_kept_alive_by_an_optimizer_whose_parameters_come_and_go():
    import gc
    import weakref

    optim, gone = Adam({"lr": 0.1}), []
    for i in range(20):
        p = param(f"x{i}")
        optim([p])
        gone.append(weakref.ref(p))
        pyro.clear_param_store()
    optim([param("last")])
    del p
    gc.collect()
    assert sum(r() is not None for r in gone) <= 1
    assert set(optim.get_state()) == {"last"}
    assert len(list(optim._groups)) == 1


def test_scoped_parameters_go_on_where_they_were():
    store, optim = pyro.get_param_store(), Adam({"lr": 0.1})
    with store.scope() as first:
        optim([param("a")])
    with store.scope() as second:
        optim([param("b")])
    for scope, name in ((first, "a"), (second, "b")):
        with store.scope(scope):
            optim([param(name)])
            assert optim.get_state()[name]["state"][0]["step"] == 2


def test_lbfgs_is_refused():
    with pytest.raises(ValueError, match="closure"):
        PyroOptim(torch.optim.LBFGS, {"lr": 0.1})


@pytest.mark.parametrize("make", [SGD, Adam, ClippedAdam])
def test_nan_learning_rate_is_refused(make):
    with pytest.raises(ValueError, match="lr is nan"):
        make({"lr": math.nan})
    with pytest.raises(ValueError, match="parameter 'x': lr is nan"):
        make(lambda name: {"lr": math.nan})([param()])


def test_scheduler_without_optimizer_is_refused_and_its_arguments_are_left_alone():
    with pytest.raises(ValueError, match="'optimizer'"):
        ExponentialLR({"gamma": 0.9})
    args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    ExponentialLR(args)
    assert set(args) == {"optimizer", "optim_args", "gamma"}


def test_two_parameters_of_one_name_are_refused():
    old = param("a")
    pyro.get_param_store()["a"] = torch.ones(2)  # the store still knows the old tensor by this name
    with pytest.raises(ValueError, match=r"two parameters are called 'a'.*\(2,\)|\(3,\)"):
        Adam({"lr": 0.1})([old, pyro.param("a").unconstrained()])


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


def test_arguments_of_the_wrong_type_are_refused():
    with pytest.raises(TypeError, match="optim_args"):
        Adam(0.1)
    with pytest.raises(TypeError, match="expected a dict"):
        Adam(lambda name: 0.1)([param()])
    with pytest.raises(ValueError, match="clip_nrm.*Known"):
        Adam({"lr": 0.1}, {"clip_nrm": 1.0})
    with pytest.raises(ValueError, match="nonfinite"):
        Adam({"lr": 0.1}, nonfinite="ignore")


def test_nonfinite_gradient_skips_the_step_for_all_and_names_the_parameter(caplog):
    optim = Adam({"lr": 0.1}, nonfinite="skip")
    optim([param("a"), param("b", gradient=math.nan)])
    assert optim.num_skipped_steps == 1
    assert optim.nonfinite_names == ("b",)
    assert "'b'" in caplog.text
    assert torch.equal(value("a"), torch.zeros(3))
    optim([param("a"), param("b")])
    assert optim.get_state()["a"]["state"][0]["step"] == 1


def test_nonfinite_gradient_raises_when_asked_to():
    with pytest.raises(FloatingPointError, match="'b'"):
        Adam({"lr": 0.1}, nonfinite="raise")([param("a"), param("b", gradient=math.inf)])


def handed_over(gradient, names="ab", clip=None, **options):
    """An optimizer, and the packed gradients of parameters of three elements each."""
    params = tuple(param(name) for name in names)
    flat = FlatGradients(tuple(names), params, torch.full((3 * len(names),), gradient))
    return SGD({"lr": 1.0}, clip, **options), flat


def test_clip_and_step_tells_whether_it_stepped():
    optim, flat = handed_over(1.0, nonfinite="skip")
    assert optim.clip_and_step([flat]) is True
    assert torch.equal(value("b"), -torch.ones(3))
    flat.buffer[4] = math.nan
    assert optim.clip_and_step([flat]) is False
    assert optim.nonfinite_names == ("b",)
    assert torch.equal(value("b"), -torch.ones(3))


def test_global_norm_clips_by_the_norm_that_all_processes_have_together():
    optim, flat = handed_over(1.0, clip={"global_norm": 5.0})
    optim.clip_and_step([flat], total_norm=10.0)
    torch.testing.assert_close(value("a"), torch.full((3,), -0.5))
    flat.buffer.fill_(1.0)
    optim.clip_and_step([flat])  # its own norm is sqrt(6)
    torch.testing.assert_close(value("a"), torch.full((3,), -1.5))


def test_step_is_left_out_where_another_process_has_a_gradient_that_is_not_finite(caplog):
    optim, flat = handed_over(1.0, nonfinite="skip")
    assert not optim.clip_and_step([flat], is_finite=False)
    assert optim.num_skipped_steps == 1
    assert optim.nonfinite_names == ()
    assert "another process" in caplog.text
    assert torch.equal(value("a"), torch.zeros(3))
    optim.nonfinite = "raise"
    with pytest.raises(FloatingPointError, match="another process"):
        optim.clip_and_step([flat], is_finite=False)
    optim.nonfinite = "step"
    assert optim.clip_and_step([flat], is_finite=False)


def test_scaler_backs_off_for_a_gradient_of_another_process_as_for_its_own():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optim, flat = handed_over(8.0, scaler=scaler)
    scaler.scale(torch.ones(()))
    assert not optim.clip_and_step([flat], is_finite=False)
    assert scaler.get_scale() == 4.0
    assert torch.equal(value("a"), torch.zeros(3))
    flat.buffer.fill_(4.0)
    assert optim.clip_and_step([flat])
    assert torch.equal(value("a"), -torch.ones(3))

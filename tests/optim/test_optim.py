"""What pyro.optim gets wrong is right here, and steps whose gradients are not finite are what the user asked for."""

import importlib
import math
import pkgutil

import pyro.optim
import pytest
import torch

import distopt.optim
from distopt.optim import SGD, Adam, FlatGradients
from tests.optim.trajectories import param, value


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


@pytest.mark.parametrize("name", [each.name for each in pkgutil.iter_modules(pyro.optim.__path__)])
def test_every_module_and_name_of_pyros_layout_is_here(name):
    theirs, ours = (importlib.import_module(f"{package}.optim.{name}") for package in ("pyro", "distopt"))
    names = {
        each
        for each, value in vars(theirs).items()
        if str(getattr(value, "__module__", "")).startswith("pyro.optim") and not each.startswith("_")
    }
    assert names
    for each in names:
        mine, its = getattr(ours, each), getattr(theirs, each)
        assert callable(mine)
        if isinstance(its, type):
            assert issubclass(mine, its), each
    assert getattr(distopt.optim, name) is ours


def test_every_public_name_of_pyro_optim_is_here():
    missing = [name for name in dir(pyro.optim) if not name.startswith("_") and not hasattr(distopt.optim, name)]
    assert missing == ["pyro"]
    assert set(pyro.optim.__all__) <= set(dir(distopt.optim)) | {"_LRScheduler"}

"""Optimizers of `pyro.optim` that are wrapped: they continue as they would have."""

from __future__ import annotations

import pyro
import pyro.optim
import pytest
import torch

from distopt.optim import PyroLRScheduler, PyroOptim
from distopt.optim.distributed.convert import from_pyro


def test_optimizer_of_distopt_is_returned_as_it_is() -> None:
    ours = PyroOptim(torch.optim.SGD, {"lr": 1.0})
    assert from_pyro(ours) is ours


def test_optimizer_of_pyro_continues_with_its_state() -> None:
    def train(optim: pyro.optim.PyroOptim, num_steps: int) -> None:
        for _ in range(num_steps):
            param = pyro.param("x").unconstrained()
            param.grad = torch.tensor([1.0, -2.0])
            optim([param])

    values = []
    for converted in (False, True):
        pyro.clear_param_store()
        pyro.param("x", torch.zeros(2))
        optim = pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})
        train(optim, 3)
        train(from_pyro(optim) if converted else optim, 3)
        values.append(pyro.param("x").detach().clone())
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=0)


def test_state_that_pyro_has_loaded_and_not_used_is_kept() -> None:
    source = PyroOptim(torch.optim.Adam, {"lr": 0.1})
    param = pyro.param("x", torch.zeros(2)).unconstrained()
    param.grad = torch.ones(2)
    source([param])
    optim = pyro.optim.Adam({"lr": 0.1})
    optim.set_state(source.get_state())
    assert from_pyro(optim).get_state()["x"]["state"][0]["step"] == 1


def test_scheduler_of_pyro_stays_one() -> None:
    args = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.5}
    ours = from_pyro(pyro.optim.ExponentialLR(args))
    assert isinstance(ours, PyroLRScheduler)
    assert ours.pt_scheduler_constructor is torch.optim.lr_scheduler.ExponentialLR
    assert (ours.pt_optim_constructor, ours.pt_optim_args, ours.kwargs) == (
        torch.optim.SGD,
        {"lr": 1.0},
        {"gamma": 0.5},
    )


def test_anything_else_is_an_error() -> None:
    with pytest.raises(TypeError, match="expected an optimizer of distopt.optim or pyro.optim"):
        from_pyro(torch.optim.SGD([torch.zeros(1)], lr=1.0))  # type: ignore[arg-type]

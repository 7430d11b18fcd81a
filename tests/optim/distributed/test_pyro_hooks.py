"""What is replaced in Pyro is replaced once, and does what Pyro does in a world of one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pyro.infer.mcmc
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, init_to_value

from distopt.optim import PyroOptim
from distopt.optim.distributed import pyro_hooks

REPLACED = [
    (pyro.infer.SVI, "step"),
    (pyro.optim.PyroOptim, "__call__"),
    (PyroOptim, "__call__"),
    (AutoLaplaceApproximation, "laplace_approximation"),
    (pyro.infer.MCMC, "run"),
    (pyro.infer.mcmc.StreamingMCMC, "run"),
    (pyro.infer.Importance, "run"),
    (pyro.infer.WeighedPredictive, "forward"),
]


def model() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))


def train() -> float:
    pyro.clear_param_store()
    guide = AutoDelta(model, init_loc_fn=init_to_value(values={"z": torch.tensor(0.5)}))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step()
    return pyro.param("AutoDelta.z").item()


@pytest.mark.parametrize(("cls", "name"), REPLACED, ids=lambda each: getattr(each, "__name__", each))
def test_method_is_replaced_once_however_often_it_is_asked_for(cls: type, name: str) -> None:
    pyro_hooks.install()
    method = getattr(cls, name)
    pyro_hooks.install()
    assert getattr(cls, name) is method and method.__name__ == name
    assert not str(method.__wrapped__.__module__).startswith("distopt.optim.distributed")
    assert method.__doc__ == method.__wrapped__.__doc__


def test_in_a_world_of_one_plain_optimizers_and_samplers_run_without_a_warning() -> None:
    pyro_hooks.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = train()
        pyro.infer.Importance(model, num_samples=2).run()

    x = torch.tensor(0.5, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.1)
    for _ in range(5):
        adam.zero_grad()
        (x.square() / 2 + (2.0 - x).square() / 2).backward()
        adam.step()
    assert value == pytest.approx(x.item(), rel=1e-6)


class Noting:
    """Writes down what is about to step, and keeps it from stepping."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def adopt_svi(self, svi: SVI, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.append(type(svi))

    def adopt_optimizer(self, optim: pyro.optim.PyroOptim) -> None:
        self.seen.append(type(optim))
        raise LookupError("before it steps")


@pytest.fixture
def adopters() -> Iterator[tuple[Noting, Noting]]:
    outer, inner = Noting(), Noting()
    pyro_hooks.begin_adopting(outer)
    pyro_hooks.begin_adopting(inner)
    yield outer, inner
    for each in (inner, outer):
        if each in pyro_hooks._adopters:
            pyro_hooks.end_adopting(each)
    assert pyro_hooks._adopters == []


def test_last_adopter_sees_an_svi_and_its_optimizer_before_they_step(adopters: tuple[Noting, Noting]) -> None:
    outer, inner = adopters
    with pytest.raises(LookupError):
        train()
    assert outer.seen == [] and inner.seen == [SVI, pyro.optim.PyroOptim]
    assert pyro.param("AutoDelta.z").item() == 0.5

    pyro_hooks.end_adopting(inner)
    with pytest.raises(LookupError):
        train()
    assert len(outer.seen) == 2 and len(inner.seen) == 2

"""An optimizer that is made distributed in place is the same object, and afterwards the one that it was."""

from __future__ import annotations

import pickle
from typing import Any

import pyro
import pyro.optim
import pytest
import torch

from distopt import optim
from distopt.optim import DistributedOptimizer
from distopt.optim.distributed.adoption import adopt_, release_


def make(kind: str) -> Any:
    module = optim if kind.startswith("distopt") else pyro.optim
    if kind.endswith("schedule"):
        return module.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9})
    return module.Adam({"lr": 0.1})


def step(optimizer: Any, num_steps: int) -> None:
    for _ in range(num_steps):
        value = pyro.param("x", torch.tensor([1.0, -2.0])) - 3.0
        value.square().sum().backward()
        (param,) = pyro.get_param_store()._params.values()
        optimizer({param})
        param.grad = None
        if isinstance(optimizer, pyro.optim.PyroLRScheduler | optim.PyroLRScheduler):
            optimizer.step()


KINDS = ["pyro", "pyro schedule", "distopt", "distopt schedule"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_before_within_and_after_are_those_of_the_plain_optimizer(kind: str) -> None:
    plain = make(kind)
    step(plain, 9)
    expected = pyro.param("x").tolist()

    pyro.clear_param_store()
    optimizer = make(kind)
    optimizer.note = "the library's"
    for _ in range(2):
        step(optimizer, 2)
        adopted = adopt_(optimizer)
        assert adopted is optimizer and isinstance(optimizer, DistributedOptimizer)
        assert isinstance(optimizer, type(make(kind))) and optimizer.note == "the library's"
        step(optimizer, 2)
        release_(adopted)
        assert type(optimizer) is type(make(kind)) and not isinstance(optimizer, DistributedOptimizer)
    step(optimizer, 1)
    assert pyro.param("x").tolist() == pytest.approx(expected, rel=1e-6)


def test_what_others_set_on_it_meanwhile_stays_and_what_adoption_needs_goes() -> None:
    optimizer = make("pyro")
    before = set(vars(optimizer))
    adopted = adopt_(optimizer)
    optimizer.epoch = 3
    release_(adopted)
    assert set(vars(optimizer)) == before | {"epoch"} and optimizer.epoch == 3


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_of_an_adopted_optimizer_is_the_plain_one_with_its_state(kind: str) -> None:
    optimizer = make(kind)
    step(optimizer, 2)
    adopt_(optimizer)
    step(optimizer, 1)
    state = optimizer.get_state()
    pyro.clear_param_store()  # Pyro's tensors hold weak references, which pickle refuses
    copied = pickle.loads(pickle.dumps(optimizer))
    assert type(copied) is type(make(kind))
    known = copied.get_state() or copied._state_waiting_to_be_consumed
    assert known.keys() == state.keys() == {"x"}


class Odd(pyro.optim.PyroOptim):  # type: ignore[misc]
    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__call__(list(params)[:1], *args, **kwargs)


def test_optimizer_that_is_distributed_or_steps_in_its_own_way_is_refused_and_left_as_it_is() -> None:
    with pytest.raises(TypeError, match="is distributed already"):
        adopt_(DistributedOptimizer(optim.Adam({"lr": 0.1})))
    odd = Odd(torch.optim.Adam, {"lr": 0.1})
    attributes = dict(vars(odd))
    with pytest.raises(TypeError, match="Odd overrides __call__ of PyroOptim"):
        adopt_(odd)
    assert type(odd) is Odd and vars(odd) == attributes

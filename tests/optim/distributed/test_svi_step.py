"""Around a gradient step: the meeting before the first one changes nothing that a single rank would see."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO, TraceTailAdaptive_ELBO
from torch import Tensor

from distopt.optim import Adam, DistributedOptimizer
from distopt.optim.distributed.svi_step import (
    loss_and_named_params,
    meet,
    preserving_buffers,
    run_once,
    step_on_all_ranks,
)
from distopt.reduce import ReduceOptions

DATA = torch.tensor([1.0, 2.0, 4.0])


def model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), scale))


def make_svi(loss: Any = None, passes: int = 1, model: Any = model) -> SVI:
    optim = DistributedOptimizer(Adam({"lr": 0.1}), reduce=ReduceOptions(backward_passes_per_step=passes))
    return SVI(model, guide, optim, loss or Trace_ELBO())


def values() -> dict[str, float]:
    return {name: value.item() for name, value in pyro.get_param_store().items()}


def test_steps_are_those_of_pyro() -> None:
    plain = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    original = getattr(SVI.step, "__wrapped__", SVI.step)
    pyro.set_rng_seed(1)
    losses, expected = [original(plain, DATA) for _ in range(4)], values()
    pyro.clear_param_store()
    svi = make_svi()
    pyro.set_rng_seed(1)
    assert [step_on_all_ranks(svi, (DATA,), {}).loss for _ in range(4)] == pytest.approx(losses, rel=1e-6)
    assert values() == pytest.approx(expected, rel=1e-6)


def test_meeting_makes_the_parameters_and_leaves_generators_gradients_and_buffers() -> None:
    norm = torch.nn.BatchNorm1d(1)
    svi = make_svi(model=lambda x: model(norm(x[:, None])[:, 0].detach()))
    pyro.set_rng_seed(5)
    state = torch.get_rng_state()
    meet(svi, (DATA,), {})
    params = pyro.get_param_store()._params
    assert list(params) == ["scale", "loc"] and all(param.grad is None for param in params.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.num_batches_tracked == 0 and norm.running_mean.item() == 0.0


def test_buffers_of_called_modules_are_put_back_also_after_an_error() -> None:
    norm, other = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    with pytest.raises(ArithmeticError), preserving_buffers():
        torch.nn.Sequential(norm)(DATA[:, None])
        assert norm.num_batches_tracked == 1
        other.running_mean.fill_(7.0)  # by no call
        raise ArithmeticError
    assert norm.num_batches_tracked == 0 and norm.running_var.item() == 1.0 and other.running_mean.item() == 7.0
    norm(DATA[:, None])
    assert norm.num_batches_tracked == 1  # no hook is left behind


def test_parameters_come_in_the_order_of_the_model_and_losses_of_several_numbers_as_a_tuple() -> None:
    loss, params = loss_and_named_params(make_svi(), (DATA,), {})
    store = pyro.get_param_store()._params
    assert isinstance(loss, float) and [id(param) for param in params] == [id(store["scale"]), id(store["loc"])]
    losses, _ = loss_and_named_params(make_svi(ReweightedWakeSleep(num_particles=2)), (DATA,), {})
    assert isinstance(losses, tuple) and [type(each) for each in losses] == [float, float]


def test_objective_that_has_no_loss_is_run_once_all_the_same() -> None:
    run_once(make_svi(TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True)), (DATA,), {})
    params = pyro.get_param_store()._params
    assert set(params) == {"scale", "loc"} and all(param.grad is None for param in params.values())


def test_call_that_only_adds_gradients_has_this_ranks_loss_and_steps_nothing() -> None:
    svi = make_svi(passes=2)
    meet(svi, (DATA,), {})
    before = values()
    first = step_on_all_ranks(svi, (DATA,), {})
    assert first.num_active == 0 and isinstance(first.loss, float) and values() == before
    second = step_on_all_ranks(svi, (DATA,), {})
    assert second.num_active == 1 and values() != before


def test_error_of_the_model_is_raised_as_it_is_and_nothing_is_stepped() -> None:
    def failing(x: Tensor) -> None:
        model(x)
        if len(x) < 3:
            raise ArithmeticError("rotten rows")

    svi = make_svi(model=failing)
    step_on_all_ranks(svi, (DATA,), {})
    before = values()
    with pytest.raises(ArithmeticError, match="^rotten rows$"):
        step_on_all_ranks(svi, (DATA[:1],), {})
    assert values() == before

"""Pyro's library trains inside `everywhere()` as by itself; on two ranks the replicas end equal.

What a rank is given is its own affair: `CEVAE.fit` and the models of sequences get its rows, and train as one process
with all rows where nothing is drawn, while a time series and an epidemic have no rows to split, so each rank has all of
the data and more ranks are more particles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.cevae import CEVAE, PreWhitener
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.contrib.mue.models import FactorMuE, ProfileHMM
from torch import Tensor
from torch.utils.data import TensorDataset

from distopt.backends import current
from distopt.infer import everywhere
from tests.infer.one_process import same_draws
from tests.workers import world

NUM_ROWS = 12
Result = tuple[list[float], dict[str, list[float]]]


def cause_and_effect(rows: slice, batch_size: int = 3) -> list[float]:
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(NUM_ROWS, 3, generator=rng)
    t = (x[:, 0] > 0).float()
    y = (x[:, 1] + t > 0).float()
    cevae = CEVAE(feature_dim=3, latent_dim=2, hidden_dim=4, num_layers=2, num_samples=2)
    num_epochs = batch_size // 3  # four batches of 3 rows make one
    # It standardises by what it is given; here by the rows of all, whichever it gets.
    with patch("pyro.contrib.cevae.PreWhitener", lambda _: PreWhitener(x)):
        return list(cevae.fit(x[rows], t[rows], y[rows], num_epochs=num_epochs, batch_size=batch_size, log_every=0))


def epidemic(rows: slice) -> list[float]:
    cases = torch.tensor([1.0, 2.0, 3.0, 5.0])
    model = SimpleSIRModel(population=100, recovery_time=3.0, data=cases)
    return list(model.fit_svi(num_steps=2, num_particles=2, num_samples=2, heuristic_num_particles=4))


class Walk(ForecastingModel):
    """A random walk with a drift."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        with self.time_plate:
            jumps = pyro.sample("jumps", dist.Normal(drift, 0.3))
        self.predict(dist.Normal(0.0, 0.5), jumps.cumsum(-1).unsqueeze(-1))


def forecast(rows: slice) -> list[float]:
    data = torch.linspace(0.0, 3.0, 8).unsqueeze(-1)
    return list(Forecaster(Walk(), data, torch.empty(8, 0), num_steps=5, log_every=0).losses)


def sequences(rows: slice) -> TensorDataset:
    letters = (torch.arange(NUM_ROWS)[:, None] * 3 + torch.arange(5) ** 2) % 4
    return TensorDataset(torch.nn.functional.one_hot(letters, 4).float()[rows], torch.full((NUM_ROWS,), 5.0)[rows])


def factors(rows: slice, batch_size: int = 3) -> list[float]:
    model = FactorMuE(data_length=5, alphabet_length=4, z_dim=2, batch_size=batch_size, latent_seq_length=5)
    return list(model.fit_svi(sequences(rows), epochs=4, batch_size=batch_size))


def profile(rows: slice, batch_size: int = 3) -> list[float]:
    model = ProfileHMM(latent_seq_length=5, alphabet_length=4)
    return list(model.fit_svi(sequences(rows), epochs=4, batch_size=batch_size))


FITS: dict[str, Callable[..., list[float]]] = {
    "CEVAE.fit": cause_and_effect,
    "SIR.fit_svi": epidemic,
    "Forecaster": forecast,
    "FactorMuE.fit_svi": factors,
    "ProfileHMM.fit_svi": profile,
}
NEEDS_NO_ROWS = ("SIR.fit_svi", "Forecaster")
PLATES = {"CEVAE.fit": "data", "FactorMuE.fit_svi": "batch", "ProfileHMM.fit_svi": "batch"}
SHARES = {2: [slice(0, 7), slice(7, 12)], 3: [slice(0, 3), slice(3, 8), slice(8, 12)]}


def fit(name: str, rows: slice = slice(None)) -> Result:
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    losses = [float(loss) for loss in FITS[name](rows)]
    params = {name: value.detach().reshape(-1).tolist() for name, value in sorted(pyro.get_param_store().items())}
    return losses, params


def assert_close(actual: Result, expected: Result) -> None:
    # In float32, where the order of a sum is another in packed memory.
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)
    assert actual[1].keys() == expected[1].keys() and actual[1]
    for name, value in expected[1].items():
        assert actual[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def _run_fit(name: str, rows_by_rank: list[slice], options: dict[str, Any]) -> Result:
    with everywhere(**options):
        return fit(name, rows_by_rank[current().rank])


@pytest.mark.parametrize("name", FITS)
def test_one_process_trains_as_by_pyro_alone(name: str) -> None:
    expected = fit(name)
    with everywhere():
        actual = fit(name)
    assert_close(actual, expected)


def _run_exactly(name: str) -> Result:
    """Without noise, and all rows of a rank in each step: those of its share, or all where there is one rank."""
    share = SHARES.get(current().world_size, [slice(None)])[current().rank]
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    with same_draws(), everywhere(plates=PLATES[name], replicated=["*"]):
        losses = [float(loss) for loss in FITS[name](share, NUM_ROWS)]
        if name == "CEVAE.fit":  # the loss of all rows, divided by how many it was given
            losses = [loss * len(range(NUM_ROWS)[share]) for loss in losses]
        params = {name: value.detach().reshape(-1).tolist() for name, value in sorted(pyro.get_param_store().items())}
    return losses, params


@pytest.mark.parametrize("num_workers", SHARES)
@pytest.mark.parametrize("name", PLATES)
def test_rows_that_are_split_unevenly_train_as_one_process_with_all_rows(name: str, num_workers: int) -> None:
    ((expected_losses, expected),) = world("torch_dist", 1).run(_run_exactly, name)
    for losses, params in world("torch_dist", num_workers).run(_run_exactly, name):
        assert losses == pytest.approx(expected_losses, rel=1e-9) and len(losses) >= 4
        assert params == {name: pytest.approx(value, rel=1e-7, abs=1e-9) for name, value in expected.items()}


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("name", NEEDS_NO_ROWS)
def test_ranks_with_all_data_and_equal_noise_train_as_one_pyro_process(name: str, num_workers: int) -> None:
    expected = fit(name)
    for actual in world("torch_dist", num_workers).run(
        _run_fit, name, [slice(None)] * num_workers, {"noise": "shared"}
    ):
        assert_close(actual, expected)


@pytest.mark.parametrize("name", FITS)
def test_two_ranks_with_rows_and_noise_of_each_end_with_equal_parameters(name: str) -> None:
    first, second = world("torch_dist", 2).run(_run_fit, name, [slice(0, 6), slice(6, 12)], {})
    assert first == second
    # One rank by itself draws the same noise, and reads rank 0's rows.
    assert first[1] != fit(name, slice(0, 6))[1]

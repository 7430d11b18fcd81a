"""Which aircraft are late? The flights model, with the aircraft and their flights split over the workers."""

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
_Z90 = 1.6449  # 90 % of a standard normal are within this distance of 0


class Aircraft(Flights):
    """The model `Flights`, in which only one worker knows the effect of an aircraft.

    A row is an aircraft: each worker holds some aircraft with all of their flights. The effects of its aircraft, their
    gradients and Adam's moments never leave it; the effects of carriers, destinations, hours and months are replicated.

    Args:
        **arguments: Those of `Flights`.

    Attributes:
        effects: Parameters of all aircraft's effects by name, (aircraft,) each; empty before `collect`.
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
        """Returns the arguments of `model` for all flights of these aircraft; their codes count from 0 among `rows`."""
        # A sharded task gets the same rows in every step, so the flights are selected once.
        if not np.array_equal(rows, self._held):
            local_code = np.full(self.rows(), -1, dtype=np.int64)
            local_code[rows] = np.arange(len(rows))
            is_held = local_code[self._aircraft_of] >= 0

            columns = dict(zip((*COLUMNS, "delay"), self.select(self._train[is_held]), strict=True))
            columns["aircraft"] = torch.from_numpy(local_code[self._aircraft_of[is_held]])
            self._held = rows
            self._batch = tuple(columns.values())
        return self._batch

    # The two differences from `Flights`: the plate of aircraft is sharded, and the plate of flights with it, because a
    # flight is held by the worker that holds its aircraft.

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
        """Gathers the effects of all aircraft, on every worker."""
        self.effects = gather_local("aircraft")

    def report(self, report: Report) -> None:
        """Adds a table of the latest and the earliest aircraft."""
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
        note = (
            "Typical delay compared with the average aircraft, other things being equal; the latest and the earliest."
        )
        report.table("Which aircraft are late", ["tail number", "flights", "minutes", "90 % interval"], rows, note)

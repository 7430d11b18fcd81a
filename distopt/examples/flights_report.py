"""The results of the flights example, as tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from distopt.examples.flights import Flights
    from distopt.train.report import Report

NUM_DRAWS = 300
LATE_MINUTES = 30.0
INTERVAL = (0.05, 0.95)
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_INK = "#2563a8"

Draws = dict[str, Tensor]
"""Posterior draws of each site, (draws, *shape of the site)."""


def write_flights_report(flights: Flights, report: Report) -> None:
    """Adds the results to `report`."""
    # All tables and figures are made from one set of posterior draws, so that their numbers agree.
    draws = posterior_draws(flights)
    data = flights.data
    report.text(
        f"{data.num_rows:,} departures of 2013, of which {data.num_cancelled:,} were cancelled and "
        f"{data.num_diverted:,} have no recorded arrival: these {data.num_cancelled + data.num_diverted:,} rows are "
        f"left out. Trained on {flights.rows():,} flights, judged on {len(flights.held_out):,} others. Intervals are "
        "those of the guide: AutoNormal takes all effects as independent, which tends to make them too narrow."
    )
    _carriers(flights, draws, report)
    _hours(flights, draws, report)
    _spreads(flights, draws, report)
    _prediction(flights, draws, report)


@torch.no_grad()
def posterior_draws(flights: Flights, num_draws: int = NUM_DRAWS) -> Draws:
    """Returns draws from the guide; all effects but the aircraft's are deviations from the average, as in the model."""
    # The guide does not depend on the data, so a single row will do.
    batch = flights.batch(np.arange(1))
    sampled = [flights.guide(*batch) for _ in range(num_draws)]
    draws = {name: torch.stack([draw[name] for draw in sampled]).cpu() for name in sampled[0]}
    for name in ("carrier", "destination", "hour", "month", "hour_spread"):
        share = flights.shares[name.removesuffix("_spread")].cpu()
        draws[name] = draws[name] - (draws[name] @ share)[:, None]
    return draws


def _carriers(flights: Flights, draws: Draws, report: Report) -> None:
    low, middle, high = _interval(draws["carrier"])
    counts = np.bincount(flights.data.codes["carrier"])
    names = flights.data.levels["carrier"]
    rows = [
        (names[k], f"{counts[k]:,}", f"{middle[k]:+.1f}", f"{low[k]:+.1f} to {high[k]:+.1f}")
        for k in np.argsort(-middle)
    ]
    report.table(
        "Which carriers are late",
        ["carrier", "flights", "minutes", "90 % interval"],
        rows,
        "Typical delay compared with the average flight, for equal destination, aircraft, hour and month.",
    )
    report.figure(
        _forest(
            [row[0] for row in rows], draws["carrier"][:, np.argsort(-middle).copy()], "minutes, average flight = 0"
        ),
        "Carriers: posterior median and 90 % interval.",
    )


def _hours(flights: Flights, draws: Draws, report: Report) -> None:
    hours = flights.data.levels["hour"]
    typical = draws["mu"][:, None] + draws["hour"]
    late = _chance_of_late(draws, typical)
    low, middle, high = _interval(typical)
    rows = [
        (f"{hour}:00", f"{middle[k]:+.1f}", f"{low[k]:+.1f} to {high[k]:+.1f}", f"{100 * late[k]:.0f} %")
        for k, hour in enumerate(hours)
    ]
    report.table(
        "Which hours are late",
        ["scheduled departure", "typical delay, minutes", "90 % interval", f"over {LATE_MINUTES:.0f} minutes late"],
        rows,
        "For an average carrier, destination, aircraft and month; the typical delay is the middle of the distribution.",
    )

    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2)
    _band(left, [int(hour) for hour in hours], typical, "hour of scheduled departure")
    month = draws["mu"][:, None] + draws["month"]
    _band(right, range(len(MONTHS)), month, "")
    right.set_xticks(range(len(MONTHS)), MONTHS, fontsize=8)
    left.set_ylabel("typical delay (minutes)")
    report.figure(figure, "Typical delay by hour and by month: posterior median and 90 % interval.")


def _spreads(flights: Flights, draws: Draws, report: Report) -> None:
    names = {
        "carrier": "carriers",
        "destination": "destinations",
        "aircraft": "aircraft",
        "hour": "hours of the day",
        "month": "months",
    }
    rows = []
    for name, plural in names.items():
        low, middle, high = _interval(draws[f"tau_{name}"][:, None])
        levels = f"{len(flights.data.levels[name]):,}"
        rows.append((f"between {plural}", levels, f"{middle[0]:.1f}", f"{low[0]:.1f} to {high[0]:.1f}"))
    report.table(
        "Where the differences are",
        ["standard deviation", "levels", "minutes", "90 % interval"],
        rows,
        f"Flights that share all five still differ: Student-t, scale {float(draws['sigma'].median()):.1f} minutes, "
        f"{float(draws['nu'].median()):.1f} degrees of freedom.",
    )

    figure = Figure(figsize=(9, 5))
    left, right = figure.subplots(1, 2)
    _extremes(left, flights.data.levels["destination"], draws["destination"], "Destinations")
    _extremes(right, flights.data.levels["aircraft"], draws["aircraft"], "Aircraft")
    figure.tight_layout()
    report.figure(figure, "The latest and the earliest destinations and aircraft: median and 90 % interval, minutes.")


def _prediction(flights: Flights, draws: Draws, report: Report) -> None:
    model = held_out_score(flights, draws)
    baseline = baseline_score(flights)
    rows = [
        ("hierarchical regression", f"{model[0]:.4f}", f"{model[1]:.2f}"),
        ("median of carrier and month", f"{baseline[0]:.4f}", f"{baseline[1]:.2f}"),
        ("difference", f"{model[0] - baseline[0]:+.4f}", f"{model[1] - baseline[1]:+.2f}"),
    ]
    report.table(
        "Prediction of held-out flights",
        ["", "log density per flight", "mean absolute error, minutes"],
        rows,
        f"{len(flights.held_out):,} flights. Log density in nats, higher is better; the baseline has a Student-t too, "
        "fitted to the training flights.",
    )


@torch.no_grad()
def held_out_score(flights: Flights, draws: Draws, num_draws: int = 50) -> tuple[float, float]:
    """Returns how well held-out flights are predicted.

    The density is averaged over posterior draws before the logarithm is taken (Gelman et al., Bayesian Data Analysis,
    3rd edition, section 7.1).

    Returns:
        The log pointwise predictive density per flight (nats) and the mean absolute error (minutes).
    """
    *index, delay = flights.select(flights.held_out)
    log_density = []
    typical = torch.zeros_like(delay)
    for k in range(num_draws):
        draw = {name: values[k] for name, values in draws.items()}
        location = draw["mu"] + sum(
            draw[name][codes]
            for name, codes in zip(("carrier", "destination", "aircraft", "hour", "month"), index, strict=True)
        )
        spread = draw["sigma"] * draw["hour_spread"][index[3]].exp()
        log_density.append(dist.StudentT(draw["nu"], location, spread).log_prob(delay))
        typical += location / num_draws
    density = torch.logsumexp(torch.stack(log_density), 0) - math.log(num_draws)
    return float(density.mean()), float((delay - typical).abs().mean())


def baseline_score(flights: Flights) -> tuple[float, float]:
    """Returns the same two scores for each carrier's median delay in each month, with a Student-t fitted around it."""
    train, held_out = (
        {"carrier": columns[0].numpy(), "month": columns[4].numpy(), "delay": columns[5].numpy()}
        for columns in (flights.batch(np.arange(flights.rows())), flights.select(flights.held_out))
    )

    # Groups without training flights get the overall median.
    median = np.full((train["carrier"].max() + 1, 12), np.median(train["delay"]))
    for carrier, month in np.ndindex(median.shape):
        group = train["delay"][(train["carrier"] == carrier) & (train["month"] == month)]
        if len(group):
            median[carrier, month] = np.median(group)

    residual = train["delay"] - median[train["carrier"], train["month"]]
    nu, location, scale = _fit_student(torch.from_numpy(residual))
    error = held_out["delay"] - median[held_out["carrier"], held_out["month"]]
    density = dist.StudentT(nu, location, scale).log_prob(torch.from_numpy(error)).mean()
    return float(density), float(np.abs(error).mean())


def _fit_student(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns degrees of freedom, location and scale of the Student-t that fits these values best."""
    # Logarithms of nu and scale, so that the search is unconstrained.
    free = torch.tensor([1.0, 0.0, math.log(float(values.abs().median()))], dtype=values.dtype, requires_grad=True)
    optimizer: Any = torch.optim.LBFGS([free], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        nats: Tensor = -dist.StudentT(free[0].exp(), free[1], free[2].exp()).log_prob(values).mean()
        torch.autograd.backward(nats)
        return nats

    optimizer.step(loss)
    nu, location, scale = free.detach()
    return nu.exp(), location, scale.exp()


def _chance_of_late(draws: Draws, typical: Tensor) -> NDArray[np.float64]:
    """Returns the probability of a delay beyond LATE_MINUTES at each hour, (hours,), by drawing delays."""
    deviation = dist.StudentT(draws["nu"]).sample((1000,))  # (1000, draws)
    spread = draws["sigma"][:, None] * draws["hour_spread"].exp()  # (draws, hours)
    late = (typical + spread * deviation[..., None] > LATE_MINUTES).double().mean((0, 1))
    return np.asarray(late.numpy())


def _interval(draws: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns lower end, median and upper end over the first dimension."""
    low, middle, high = np.quantile(draws.double().numpy(), (INTERVAL[0], 0.5, INTERVAL[1]), axis=0)
    return low, middle, high


def _forest(names: Sequence[str], draws: Tensor, label: str) -> Figure:
    # The height grows with the number of names, so that labels never overlap.
    figure = Figure(figsize=(9, 0.28 * len(names) + 0.9))
    axes = figure.subplots()
    _points(axes, names, draws)
    axes.set_xlabel(label)
    return figure


def _points(axes: Any, names: Sequence[str], draws: Tensor) -> None:
    """Draws medians and intervals, the names from top to bottom."""
    low, middle, high = _interval(draws)
    heights = np.arange(len(names))[::-1]
    axes.hlines(heights, low, high, color=_INK, linewidth=2, alpha=0.5)
    axes.plot(middle, heights, "o", color=_INK, markersize=4)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set_yticks(heights, names, fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def _extremes(axes: Any, names: Sequence[str], draws: Tensor, title: str, count: int = 8) -> None:
    order = np.argsort(-_interval(draws)[1])
    chosen = np.concatenate([order[:count], order[-count:]])
    _points(axes, [names[k][:28] for k in chosen], draws[:, chosen.copy()])
    axes.set_title(title, fontsize=10)


def _band(axes: Any, positions: Sequence[int], draws: Tensor, label: str) -> None:
    low, middle, high = _interval(draws)
    axes.fill_between(positions, low, high, color=_INK, alpha=0.25, linewidth=0)
    axes.plot(positions, middle, "o-", color=_INK, markersize=3, linewidth=1.2)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)

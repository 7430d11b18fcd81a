"""The Laplace approximation of ranks that hold some rows each is that of one process with all rows."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, init_to_value
from torch import Tensor

from distopt.backends import current
from distopt.backends.single import Single
from distopt.optim.distributed.laplace import laplace_approximation
from tests.workers import world

DATA = torch.linspace(-1.0, 3.0, 12, dtype=torch.float64)


def model(rows: Tensor) -> None:
    zero, one = DATA.new_zeros(()), DATA.new_ones(())
    loc = pyro.sample("loc", dist.Normal(zero, 10 * one))
    scale = pyro.sample("scale", dist.LogNormal(zero, one))
    with pyro.plate("rows", len(DATA), subsample=rows):
        pyro.sample("x", dist.Normal(loc, scale), obs=DATA[rows])


def guide_near_the_mode(rows: Tensor) -> AutoLaplaceApproximation:
    start = {"loc": DATA.mean(), "scale": DATA.std()}
    guide = AutoLaplaceApproximation(model, init_loc_fn=init_to_value(values=start))
    guide(rows)
    return guide


def moments(gaussian: Any) -> list[list[float]]:
    return [getattr(gaussian, name).reshape(-1).tolist() for name in ("loc", "scale", "scale_tril")]


def moments_of_pyro(rows: Tensor) -> list[list[float]]:
    method = AutoLaplaceApproximation.laplace_approximation
    return moments(getattr(method, "__wrapped__", method)(guide_near_the_mode(rows), rows))


def test_approximation_of_one_rank_is_that_of_pyro() -> None:
    rows = torch.arange(12)
    approximated = moments(laplace_approximation(guide_near_the_mode(rows), rows, backend=Single()))
    assert approximated == [pytest.approx(values, rel=1e-9) for values in moments_of_pyro(rows)]


def _run_half_of_the_rows() -> tuple[list[list[float]], bool]:
    rows = torch.arange(6) + 6 * current().rank
    guide = guide_near_the_mode(rows)
    approximated = moments(laplace_approximation(guide, rows, backend=current()))

    with torch.no_grad():
        guide.loc.fill_(-3.0)  # far from any mode
    try:
        laplace_approximation(guide, rows, backend=current())
    except RuntimeError:
        return approximated, True
    return approximated, False


def test_approximation_of_two_ranks_is_that_of_all_rows_and_no_mode_is_an_error_on_both() -> None:
    expected = moments_of_pyro(torch.arange(12))
    for approximated, is_refused in world("torch_dist", 2).run(_run_half_of_the_rows):
        assert approximated == [pytest.approx(values, rel=1e-9) for values in expected]
        assert is_refused

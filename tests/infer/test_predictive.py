"""Samples of all rows, each drawn by the rank that has the row, are those of Pyro's `Predictive` in one process."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from distopt.backends import current
from distopt.infer import SVI, predictive, read_local, seed_all, shard, sharded_plate
from distopt.optim import Adam, DistributedOptimizer
from distopt.reduce import PeerError
from distopt.rng import begin_rank_stream
from distopt.sharding import LocalParameterError, local_parameters
from tests.infer.sharded_models import init, parameters_of_all
from tests.workers import world

NUM_ROWS = 11
DATA = torch.linspace(-2.0, 3.0, NUM_ROWS, dtype=torch.float64)
SIZES = {2: (4, 7), 3: (2, 5, 4)}


def my_rows() -> np.ndarray:
    """This rank's rows, which are no block."""
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    sizes = SIZES[current().world_size]
    start = sum(sizes[: current().rank])
    return order[start : start + sizes[current().rank]]


# Where nothing is drawn.


def model(x: Tensor) -> Tensor:
    """Values of rows in a plate inside and outside of another, of other dtypes, and outside of the plate."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    genes, rows = pyro.plate("genes", 3, dim=-2), pyro.plate("rows", len(x), dim=-1)
    with genes, rows:
        z = pyro.sample("z", dist.Gamma(2.0, scale))
        pyro.deterministic("double", 2 * z)
    with rows:
        pair = pyro.sample("pair", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("is_high", dist.Delta(x > 0.3), obs=x > 0.3)
        with genes:
            pyro.sample("x", dist.Normal(z + pair.sum(-1), 1.0), obs=x.expand(3, -1))
    pyro.deterministic("outside", x[:, None] * torch.ones(2))
    return x + scale


def as_numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in values.items()}


def assert_near(actual: dict[str, np.ndarray], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in as_numpy(expected).items():
        assert actual[name].dtype == value.dtype
        np.testing.assert_allclose(actual[name], value, rtol=1e-6, err_msg=name)


def _run_delta(folder: str) -> list[dict[str, np.ndarray]]:
    mine = my_rows()
    sharded = shard(model, "rows", rows={"rows": mine})
    guide = AutoDelta(sharded, init_loc_fn=init)
    svi = SVI(sharded, guide, DistributedOptimizer(Adam({"lr": 0.1})), Trace_ELBO())
    for _ in range(3):
        svi.step(DATA[mine])

    draw = predictive(svi.model, guide=svi.guide, num_samples=2, dims={"outside": -2})
    samples = draw(DATA[mine])
    dims = {"outside": ("rows", -2), "_RETURN": -1}
    sites = ["_RETURN", "outside", "z", "scale"]
    given = predictive(
        model, guide=guide, num_samples=3, return_sites=sites, plates="rows", rows={"rows": mine}, dims=dims, seed=1
    )
    chosen = given(DATA[mine])

    kept = predictive(svi.model, guide=svi.guide, num_samples=2, dims={"outside": -2}, folder=folder)(DATA[mine])
    assert kept["z"].shape == (2, 3, len(mine))
    latent = {name: kept[name] for name in ("scale", "z", "pair")}
    again = predictive(svi.model, latent, return_sites=["double"])(DATA[mine])
    return [*map(as_numpy, (parameters_of_all(), samples, chosen, again))]


@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_samples_of_a_guide_that_draws_nothing_are_those_of_one_process(num_workers: int, tmp_path: Path) -> None:
    results = world("torch_dist", num_workers).run(_run_delta, str(tmp_path))
    pyro.clear_param_store()
    guide = AutoDelta(model, init_loc_fn=init)
    guide(DATA)
    for name, value in results[0][0].items():
        rows_last = value.T if name.endswith("z") else value  # as in the guide
        pyro.get_param_store()[name] = torch.from_numpy(rows_last)
    expected = pyro.infer.Predictive(model, guide=guide, num_samples=2)(DATA)
    sites = ["_RETURN", "outside", "z", "scale"]
    whole = pyro.infer.Predictive(model, guide=guide, num_samples=3, return_sites=sites)(DATA)

    for _, samples, chosen, double in results:
        assert_near(samples, expected)
        assert_near(chosen, whole)
        assert_near(double, {"double": expected["double"]})
    written = read_local(tmp_path, "z", rows=[9, 0])
    torch.testing.assert_close(written, expected["z"].movedim(-1, 0)[[9, 0]], rtol=1e-7, atol=0.0)


# Where something is drawn: moments in closed form.

NUM_SAMPLES = {True: 4000, False: 250}  # in parallel, and one after the other
LOC_VAR, Z_VAR, X_VAR = 0.25, 0.09, 0.16
SIGMAS = 5.0  # one of the 200 numbers that are compared is beyond in one run of 9,000


def noisy_model(x: Tensor, num_rows: int | None = None, index: Tensor | None = None) -> None:
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", num_rows or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z + loc, X_VAR**0.5))


def noisy_guide(x: Tensor, num_rows: int | None = None, index: Tensor | None = None) -> None:
    pyro.sample("loc", dist.Normal(x.new_ones(()), LOC_VAR**0.5))
    with pyro.plate("rows", num_rows or len(x), subsample=index):
        pyro.sample("z", dist.Normal(x, Z_VAR**0.5))


def with_sharded_plates(fn: Any) -> Any:
    """As somebody writes it for distopt."""

    def sharded(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(x.new_ones(()), LOC_VAR**0.5))
        with sharded_plate("rows", len(x), rows=my_rows()):
            z = pyro.sample("z", dist.Normal(x, Z_VAR**0.5))
            if fn is noisy_model:
                pyro.sample("x", dist.Normal(z + loc, X_VAR**0.5))

    return sharded


def _run_noise(kind: str, parallel: bool) -> tuple[dict[str, np.ndarray], bool]:
    seed_all(3, 0, current().rank, "independent")
    mine = my_rows()
    options = {"num_samples": NUM_SAMPLES[parallel], "parallel": parallel}
    if kind == "own plates":
        samples = predictive(with_sharded_plates(noisy_model), guide=with_sharded_plates(noisy_guide), **options)(
            DATA[mine]
        )
    elif kind == "subsample":
        draw = predictive(noisy_model, guide=noisy_guide, plates="rows", rows={"rows": mine}, **options)
        samples = draw(DATA[mine], NUM_ROWS, torch.from_numpy(mine))
    else:
        draw = predictive(noisy_model, guide=noisy_guide, plates=["rows"], rows={"rows": mine}, **options)
        samples = draw(DATA[mine])
    return as_numpy(samples), bool(local_parameters()) or begin_rank_stream() is not None


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [("plain", True), pytest.param("own plates", False, marks=pytest.mark.slow), ("subsample", True)],
)
def test_samples_have_the_moments_of_one_process_within_their_error(kind: str, parallel: bool) -> None:
    results = world("torch_dist", 3).run(_run_noise, kind, parallel)
    for samples, has_effects in results:
        assert {name: value.shape[-1] for name, value in samples.items()} == {"loc": 1, "z": NUM_ROWS, "x": NUM_ROWS}
        assert all(np.array_equal(value, results[0][0][name]) for name, value in samples.items())
        assert not has_effects, "no parameter is marked, and noise is as it was"

    num_samples = NUM_SAMPLES[parallel]
    loc, z, x = (torch.from_numpy(samples[name]).reshape(num_samples, -1) for name in ("loc", "z", "x"))
    x_cov = LOC_VAR * torch.ones(NUM_ROWS, NUM_ROWS) + (Z_VAR + X_VAR) * torch.eye(NUM_ROWS)
    z_cov = Z_VAR * torch.eye(NUM_ROWS)
    for values, mean, cov in [(x, DATA + 1.0, x_cov.double()), (z, DATA, z_cov.double())]:
        # Standard errors of a mean, and of a covariance of normal variables (Anderson, section 3.4).
        variances = cov.diagonal()
        mean_error = (variances / num_samples).sqrt()
        cov_error = ((variances[:, None] * variances[None, :] + cov**2) / num_samples).sqrt()
        assert ((values.mean(0) - mean).abs() < SIGMAS * mean_error).all()
        assert ((values.T.cov() - cov).abs() < SIGMAS * cov_error).all()
    # In each sample the rows of all ranks are drawn with the same value of the global variable.
    residual = x - z - loc
    assert abs(float(residual.var()) - X_VAR) < SIGMAS * X_VAR * math.sqrt(2 / residual.numel())


def _run_seeds() -> list[list[float]]:
    draws = []
    for seed in (7, 7, 8, None, None):
        samples = predictive(noisy_model, guide=noisy_guide, num_samples=2, plates="rows", seed=seed)(DATA[my_rows()])
        draws.append(samples["x"].flatten().tolist())
    return draws


def test_a_seed_gives_the_same_samples_again_and_none_gives_others_each_time() -> None:
    first, second = world("torch_dist", 2).run(_run_seeds)
    assert first == second
    assert first[0] == first[1]
    assert len({str(each) for each in first}) == 4


def test_one_process_needs_no_plates() -> None:
    samples = predictive(noisy_model, guide=noisy_guide, num_samples=3)(DATA)
    assert {name: tuple(value.shape) for name, value in samples.items()} == {"loc": (3, 1), "z": (3, 11), "x": (3, 11)}


# What cannot be right is refused, on all ranks.


def failing(x: Tensor) -> None:
    if current().rank == 1:
        raise ArithmeticError("the rows are rotten")
    noisy_model(x)


def unnamed(x: Tensor) -> None:
    pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)


def two_split(x: Tensor) -> None:
    with pyro.plate("users", len(x), dim=-1), pyro.plate("items", 2, dim=-2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def returning(x: Tensor) -> list[int]:
    noisy_model(x)
    return [1]


def _error(call: Any) -> str:
    try:
        call()
    except (LocalParameterError, PeerError, ArithmeticError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _run_refused() -> dict[str, str]:
    x = DATA[my_rows()]
    even = DATA[5 * current().rank :][:5]
    index = torch.arange(len(x))
    rows = {"plates": "rows", "num_samples": 2}
    errors = {
        "failing": _error(lambda: predictive(failing, **rows)(x)),
        "unnamed": _error(lambda: predictive(noisy_model, num_samples=2)(x)),
        "as many": _error(lambda: predictive(unnamed, num_samples=2)(even)),
        "two": _error(lambda: predictive(two_split, num_samples=2, plates=["users", "items"])(x)),
        "part": _error(lambda: predictive(noisy_model, **rows)(x, NUM_ROWS, index)),
        "length": _error(lambda: predictive(noisy_model, rows={"rows": [0, 1, 2, 3]}, **rows)(x)),
        "doubly": _error(lambda: predictive(noisy_model, rows={"rows": range(len(x))}, **rows)(x)),
        "dims": _error(lambda: predictive(noisy_model, num_samples=2, dims={"x": -1})(x)),
        "no dim": _error(lambda: predictive(noisy_model, dims={"x": 1}, **rows)(x)),
        "return": _error(lambda: predictive(returning, return_sites=["_RETURN"], parallel=True, **rows)(x)),
    }
    assert _error(lambda: predictive(noisy_model, **rows)(x)) == "none", "the ranks are still together"
    return errors


REFUSED = {
    "unnamed": r"samples of site 'x' are torch.float64 \[2, 7\] on rank 1, and .* \[2, 4\] on rank 0.*plates=NAME",
    "as many": r"site 'x' has no rows of a plate that is split, and its samples on rank 1 are not those of rank 0",
    "two": "'users' and 'items', which are both split|'items' and 'users', which are both split",
    "part": r"'rows' has more rows than those of this call: give their numbers .* rows=\{'rows': INDICES\}",
    "doubly": "held by 2 of 2 ranks, expected one",
    "dims": r"dims=\{'x': -1\}: expected one plate, found none. Name it in plates=",
    "no dim": r"dims=\{'x': 1\}: its samples have shape \(2, \d\). Give a dimension from the right",
    "return": "site '_RETURN' is a list, expected a tensor",
}


def test_what_has_no_result_of_all_rows_is_refused_on_all_ranks_with_what_to_write() -> None:
    first, second = world("torch_dist", 2).run(_run_refused)
    for name, pattern in REFUSED.items():
        for errors in (first, second):
            assert re.search(pattern, errors[name], re.DOTALL), errors[name]
    assert first["failing"] == "PeerError: rank 1 of 2 raised ArithmeticError: the rows are rotten"
    assert second["failing"] == "ArithmeticError: the rows are rotten"
    assert "rank 1 of 2 raised LocalParameterError" in first["length"]
    assert "7 datapoints on this rank, but its rows have shape (4,)" in second["length"]


def test_guide_that_was_not_called_yet_leaves_the_noise_of_all_ranks_alike() -> None:
    for samples in world("torch_dist", 3).run(_run_fresh_guide):
        assert len(set(samples)) == 6


def _run_fresh_guide() -> list[float]:
    samples = predictive(noisy_model, guide=AutoNormal(noisy_model), num_samples=6, plates="rows")(DATA[my_rows()])
    return samples["loc"].flatten().tolist()


# A mistake of one rank alone.


def matrix_model(x: Tensor, num_columns: int | None = None) -> Tensor:
    """Returns a value for each row and column, which the plates do not show."""
    with pyro.plate("rows", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x, 1.0))
    with pyro.plate("items", 4, dim=-1):
        pyro.sample("w", dist.Normal(torch.zeros(4, dtype=x.dtype), 1.0))
    return z.reshape(-1, 1).expand(-1, num_columns or len(x))


def _run_mistakes(folder: str) -> dict[str, str]:
    rank = current().rank
    is_wrong = rank == 1
    x = DATA[4 * rank :][:4]
    file = Path(folder, "file")
    file.touch()
    plates = ["rows", "items"]
    drawn = {"num_samples": 2, "return_sites": ["z", "w", "_RETURN"], "parallel": False}

    def call(dim: Any = ("rows", -2), num_columns: int | None = None, plate: Any = plates, **options: Any) -> Any:
        return lambda: predictive(matrix_model, plates=plate, dims={"_RETURN": dim}, **drawn, **options)(x, num_columns)

    errors = {
        "dimension": _error(call(("rows", -1 if is_wrong else -2))),
        "length": _error(call(("rows", -1), 3 if is_wrong else 4)),
        "outside": _error(call(("rows", -4 if is_wrong else -2))),
        "plate": _error(call(("items" if is_wrong else "rows", -2))),
        "ambiguous": _error(call(-2 if is_wrong else ("rows", -2))),
        "numbers": _error(call(rows={"rows": range(4, 8)} if is_wrong else None)),
        "folder": _error(call(folder=file if is_wrong else Path(folder, "samples"))),
    }
    assert _error(call()) == "none", "the ranks are still together"
    return errors


MISTAKES = {
    "dimension": r"'_RETURN' are torch.float64 \[2, 4, rows of rows\] on rank 1, and .* \[2, rows of rows, 4\] on",
    "length": "site '_RETURN' have 3 rows in their dimension -1, and those of 'z' have 4 .* dimension that runs over",
    "outside": r"dims=\{'_RETURN': -4\}|Give a dimension from the right",
    "plate": r"'_RETURN' are torch.float64 \[2, rows of items, 4\] on rank 1, and .* \[2, rows of rows, 4\]",
    "ambiguous": "expected one plate, found items, rows",
    "numbers": "rank 1 was given the numbers of its rows, and rank 0 was not",
    "folder": "file",
}


def test_mistake_of_one_rank_is_raised_on_all_and_they_stay_together(tmp_path: Path) -> None:
    first, second = world("torch_dist", 2).run(_run_mistakes, str(tmp_path))
    for name, pattern in MISTAKES.items():
        for errors in (first, second):
            assert re.search(pattern, errors[name], re.DOTALL), (name, errors[name])

"""Cells that are split before the model is made train as in one process, and results of all cells come back."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest

from distopt.backends import current
from distopt.infer import gather_local
from distopt.sharding import local_parameters
from tests.scvi.models import CASES, NUM_CELLS, cells, train
from tests.scvi.test_models import assert_near, distances, on_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("scvi") is None, reason="scvi-tools is not installed: pip install scvi-tools"),
]
SIZES = {1: (131,), 2: (50, 81), 3: (20, 50, 61)}
FULL = {"Cell2location": {}, "RegressionModel": {"batch_size": NUM_CELLS}}


def my_cells(all_cells: Any, is_mixed: bool) -> Any:
    """This rank's uneven share; one rank of several lacks a batch and a type unless cells are mixed."""
    from distopt.scvi import split

    order = np.random.default_rng(3).permutation(NUM_CELLS)
    if not is_mixed:
        order = np.lexsort((all_cells.obs["type"], all_cells.obs["sample"]))
    sizes = SIZES[current().world_size]
    start = sum(sizes[: current().rank])
    return split(all_cells, order[start : start + sizes[current().rank]])


def _run_rows(name: str, is_mixed: bool, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import scvi

    from distopt.scvi import by_rows, export_posterior, sample_posterior

    scvi.settings.seed = 0
    everything = cells()
    data = my_cells(everything, is_mixed)
    model = CASES[name].make(data)
    train(model, CASES[name], 4, strategy=by_rows(model), device=current().world_size, **FULL[name])

    params = {key: value.detach().numpy() for key, value in sorted(pyro.get_param_store().items())}
    params |= {key: gather_local(key)[key].numpy() for key in local_parameters()}

    sampling = {"num_samples": 3, "batch_size": 45}
    samples = sample_posterior(model, return_samples=True, **sampling)
    results = {f"samples of {key}": value for key, value in samples["posterior_samples"].items()}
    # Without standard deviations, which of samples that are all the same are roundings.
    columns = {"add_to_obsm": ["means", "q05"]} if name == "Cell2location" else {}
    tables = export_posterior(model, data, into=everything, sample_kwargs=sampling, **columns)
    for key, table in tables.items():
        assert list(table.index) == list(everything.obs_names)
        np.testing.assert_array_equal(everything.obsm[key], table)
        results[key] = table.to_numpy()
    if name == "Cell2location":
        mine = export_posterior(model, data, folder=folder, add_to_obsm=["q05"], sample_kwargs=sampling)
        assert [*mine] == ["q05_cell_abundance_w_sf"] and len(mine["q05_cell_abundance_w_sf"]) == data.n_obs
        written = Path(folder, f"{[*mine][0]}-{current().rank:05d}-of-{current().world_size:05d}.csv")
        assert [line.split(",")[0] for line in written.read_text().splitlines()[1:]] == list(data.obs_names)
    return params, results


def _run_in_other_orders(num_orders: int) -> dict[str, float]:
    """How far the parameters of one process go from each other if only the order of its cells is another one."""
    import scvi

    ends = []
    for seed in range(num_orders):
        scvi.settings.seed = 0
        pyro.clear_param_store()
        model = CASES["RegressionModel"].make(cells()[np.random.default_rng(seed).permutation(NUM_CELLS)].copy())
        train(model, CASES["RegressionModel"], 4, **FULL["RegressionModel"])
        ends.append({name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()})
    apart = [distances(second, first) for first, second in combinations(ends, 2)]
    return {name: max(each[name] for each in apart) for name in ends[0]}


@pytest.mark.parametrize("is_mixed", [True, False], ids=["mixed", "by batch"])
@pytest.mark.parametrize("name", ["Cell2location", "RegressionModel"])
def test_cells_that_are_split_unevenly_train_as_in_one_process(name: str, is_mixed: bool, tmp_path: Path) -> None:
    ((expected, whole),) = on_all(1, _run_rows, name, is_mixed, str(tmp_path))
    (roundings,) = on_all(1, _run_in_other_orders, 4) if name == "RegressionModel" else ({},)
    roundings |= {f"samples of {key.removeprefix('AutoDelta.')}": each for key, each in roundings.items()}
    for num_workers in (2, 3):
        for params, results in on_all(num_workers, _run_rows, name, is_mixed, str(tmp_path)):
            assert_near(params, expected, roundings)
            assert_near(results, whole, roundings)

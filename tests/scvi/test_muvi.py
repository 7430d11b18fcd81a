"""MuVI, a package with a loop of its own, unchanged inside `everywhere()`: `make test-scvi`."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyro
import pytest

from distopt.backends import current
from distopt.infer import everywhere
from tests.infer.one_process import same_draws
from tests.scvi.models import restore_deep_getattr
from tests.scvi.test_models import assert_near, assert_same
from tests.workers import world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("muvi") is None, reason="MuVI is not installed: pip install muvi"),
]
LIMIT_S = 500  # the first body of a worker imports scanpy
NUM_ROWS, NUM_STEPS = 24, 60


def views() -> dict[str, Any]:
    """Two views of the same rows, with missing values."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(NUM_ROWS, 2))
    rna = factors @ rng.normal(size=(2, 7)) + 0.1 * rng.normal(size=(NUM_ROWS, 7))
    protein = factors @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(NUM_ROWS, 4))
    protein[3:6] = np.nan
    return {"rna": rna, "protein": protein}


def _fit(optimizer: str, num_shares: int) -> tuple[dict[str, Any], list[float]]:
    """Its own `fit` on this rank's rows; returns values of the parameters, and the losses.

    MuVI divides its loss by the rows that it is given. So each rank gets equally many, and the loss of W ranks is W
    times that of one; with `num_shares` = W, one rank takes that one, too: Adam's epsilon is not scaled with it.
    """
    restore_deep_getattr()
    import muvi

    class Shared(muvi.MuVI):
        def _setup_svi(self, *args: Any, **kwargs: Any) -> Any:
            num_samples = self.n_samples
            self.n_samples = NUM_ROWS // num_shares
            svi = super()._setup_svi(*args, **kwargs)
            self.n_samples = num_samples
            return svi

    logging.getLogger("muvi").setLevel(logging.WARNING)
    backend = current()
    mine = {name: np.split(view, backend.world_size)[backend.rank] for name, view in views().items()}
    kind = muvi.MuVI if backend.world_size == num_shares else Shared
    with same_draws(), everywhere(plates="sample", local={"*.z": 0}):
        model = kind(mine, n_factors=3, normalize=False, device="cpu")
        model.fit(n_epochs=NUM_STEPS, n_particles=1, optimizer=optimizer, early_stopping=False, verbose=False, seed=1)
        values = {
            name.split(".", 1)[1]: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()
        }
        return values, model._training_log["history"]


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("optimizer", ["adam", "clipped"])
def test_muvi_of_split_rows_is_fitted_as_by_one_process(optimizer: str, num_workers: int) -> None:
    ((expected, losses),) = world("torch_dist", 1).run(_fit, optimizer, num_workers, timeout_s=LIMIT_S)
    assert losses[-1] < 0.95 * losses[0]
    ranks = world("torch_dist", num_workers).run(_fit, optimizer, num_workers, timeout_s=LIMIT_S)
    common = [{name: value for name, value in values.items() if not name.endswith(".z")} for values, _ in ranks]
    for (_, each), values in zip(ranks, common, strict=True):
        np.testing.assert_allclose(each, losses, rtol=1e-6)
        assert_same(values, common[0])
    rows = {
        name: np.concatenate([values[name] for values, _ in ranks]) for name in ("_guide.locs.z", "_guide.scales.z")
    }
    assert_near(common[0] | rows, expected)

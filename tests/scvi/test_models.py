"""Models of scvi-tools, unchanged and by their own `train()`, on two workers: `make test-scvi` runs these."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pytest

from distopt.backends import current
from tests.workers import world

pytest.importorskip("scvi", reason="scvi-tools is not installed: pip install scvi-tools")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NUM_CELLS = 130


def cells() -> Any:
    import anndata

    counts = np.random.default_rng(0).poisson(3.0, (NUM_CELLS, 40)).astype("float32")
    return anndata.AnnData(counts)


def _run_model(name: str, num_epochs: int) -> tuple[dict[str, bytes], dict[str, bytes], int]:
    """Returns parameters, buffers, and the number of epochs that were trained."""
    import scvi

    import distopt.lightning  # noqa: F401  # makes the strategy known

    scvi.settings.seed = 0
    model_class = {"AmortizedLDA": scvi.model.AmortizedLDA, "Decipher": scvi.external.Decipher}[name]
    data = cells()
    model_class.setup_anndata(data)
    model = model_class(data)
    options = {"accelerator": "cpu", "enable_progress_bar": False, "early_stopping": name == "Decipher"}
    model.train(num_epochs, batch_size=32, strategy="distopt", device=current().world_size, **options)
    params = {name: value.detach().numpy().tobytes() for name, value in pyro.get_param_store().items()}
    buffers = {name: value.numpy().tobytes() for name, value in model.module.named_buffers()}
    return params, buffers, model.trainer.current_epoch


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["AmortizedLDA", "Decipher"])
def test_unchanged_model_has_equal_parameters_and_statistics_on_all_workers(name: str) -> None:
    first, second = world("torch_dist", 2).run(_run_model, name, 3, timeout_s=800)
    assert first == second
    assert len(first[0]) >= 10 and first[2] == 3

"""Published models of scvi-tools and cell2location, set up as their tutorials do, on a few cells.

No module of this folder imports scvi-tools, anndata or cell2location before a test runs: CI has none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyro
from lightning.pytorch.callbacks import Callback
from pyro.infer.autoguide import AutoDelta

NUM_CELLS = 131
NUM_GENES = 60
NUM_LABELS = 3


def cells() -> Any:
    """Counts of cells of two batches and three types, in random order, with positions in space and names."""
    import anndata
    import pandas as pd
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    labels = rng.integers(NUM_LABELS, size=NUM_CELLS)
    rates = 1.0 + 5.0 * rng.random((NUM_LABELS, NUM_GENES))
    counts = rng.poisson(rates[labels] * (0.5 + rng.random((NUM_CELLS, 1)))).astype("float32")
    obs = pd.DataFrame(
        {"sample": np.array(["a", "b"])[rng.integers(2, size=NUM_CELLS)], "type": [f"type {each}" for each in labels]},
        index=[f"cell {number:03}" for number in rng.permutation(NUM_CELLS)],
    )
    data = anndata.AnnData(counts, obs=obs)
    data.var_names = [f"gene {number}" for number in range(NUM_GENES)]

    positions = rng.random((NUM_CELLS, 2))
    distances, neighbors = NearestNeighbors(n_neighbors=11).fit(positions).kneighbors(positions)
    data.obsm["X_spatial"] = positions
    data.obsm["distance_neighbor"] = distances[:, 1:] ** 2
    data.obsm["index_neighbor"] = neighbors[:, 1:]
    return data


def restore_deep_getattr() -> None:
    """Puts back the function that cell2location 0.1.5 and MuVI 0.2.2 import from Pyro, which 1.9.2 no longer has."""
    from pyro.infer.autoguide import guides, utils

    for module in (guides, utils):
        if not hasattr(module, "deep_getattr"):
            module.deep_getattr = lambda obj, name: attrgetter(name)(obj)


def import_cell2location() -> Any:
    """Imports cell2location, with any Pyro."""
    restore_deep_getattr()
    import cell2location.models

    return cell2location.models


def cell2location(data: Any, **options: Any) -> Any:
    """A Cell2location of this data."""
    import pandas as pd

    models = import_cell2location()
    rates = 1.0 + np.random.default_rng(1).random((NUM_GENES, NUM_LABELS)).astype("float32")
    signatures = pd.DataFrame(rates, index=data.var_names, columns=[f"type {each}" for each in range(NUM_LABELS)])
    models.Cell2location.setup_anndata(data, batch_key="sample")
    settings = {"N_cells_per_location": 5, "detection_alpha": 20.0, "n_groups": 4, **options}
    return models.Cell2location(data, cell_state_df=signatures, **settings)


def exact_cell2location(data: Any, **options: Any) -> Any:
    """One whose guide draws nothing."""
    return cell2location(data, create_autoguide_kwargs={"guide_class": AutoDelta}, **options)


def regression(data: Any) -> Any:
    """A RegressionModel of this data."""
    models = import_cell2location()
    models.RegressionModel.setup_anndata(data, batch_key="sample", labels_key="type")
    return models.RegressionModel(data)


def exact_regression(data: Any) -> Any:
    """One whose guide draws nothing; the class offers no choice of guides."""
    model = regression(data)
    module = model.module
    module._guide = AutoDelta(module.model, init_loc_fn=module.init_to_value, create_plates=module.model.create_plates)
    return model


def lda(data: Any) -> Any:
    """An AmortizedLDA of this data."""
    import scvi

    scvi.model.AmortizedLDA.setup_anndata(data)
    return scvi.model.AmortizedLDA(data, n_topics=3, n_hidden=8)


def decipher(data: Any) -> Any:
    """A Decipher of this data."""
    import scvi

    scvi.external.Decipher.setup_anndata(data)
    return scvi.external.Decipher(data)


def resolvi(data: Any) -> Any:
    """A RESOLVI of this data, with neighbours that scanpy need not look for."""
    import scvi

    scvi.external.RESOLVI.setup_anndata(data, batch_key="sample", prepare_data=False)
    return scvi.external.RESOLVI(data, n_latent=3, n_hidden=8, n_hidden_encoder=8, mixture_k=4)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        make: Returns the model of some data.
        train: Keyword arguments of its `train`.
        is_exact: Whether W workers must reach the numbers of one.
    """

    make: Callable[..., Any]
    train: dict[str, Any] = field(default_factory=dict)
    is_exact: bool = False


CASES = {
    "Cell2location": Case(exact_cell2location, {"batch_size": None, "train_size": 1}, True),
    "Cell2location in minibatches": Case(exact_cell2location, {"batch_size": 32, "train_size": 1}, True),
    "Cell2location amortised": Case(
        lambda data: cell2location(data, amortised=True, encoder_kwargs={"n_hidden": 8}),
        {"batch_size": 32, "train_size": 1},
    ),
    "RegressionModel": Case(exact_regression, {"batch_size": 50, "train_size": 1}, True),
    "AmortizedLDA": Case(lda, {"batch_size": 32}),
    "Decipher": Case(decipher, {"batch_size": 32, "early_stopping": True}),
    "RESOLVI": Case(resolvi, {"batch_size": 32}),
}


class Seen(Callback):  # type: ignore[misc]
    """Counts how often this rank reads each cell, by its counts of genes."""

    def __init__(self) -> None:
        self.epochs: list[list[str]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.epochs[-1] += [row.numpy().tobytes().hex() for row in batch["X"].reshape(-1, NUM_GENES)]


def train(model: Any, case: Case, num_epochs: int, **options: Any) -> None:
    """Trains as the model itself does, on one thread and without a bar."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False}
    model.train(max_epochs=num_epochs, **{**quiet, **case.train, **options})


def values(model: Any) -> dict[str, Any]:
    """All that training has changed: parameters and buffers."""
    params = {name: value.detach().numpy() for name, value in sorted(pyro.get_param_store().items())}
    return params | {f"buffer {name}": value.detach().numpy() for name, value in model.module.named_buffers()}

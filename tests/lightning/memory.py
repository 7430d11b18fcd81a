"""What a latent variable for each row costs a rank whose rows are its own."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from distopt.backends import current
from tests.infer.sharded_costs import NUM_DIMS, forget_peak, model, start, status_bytes
from tests.lightning.plans import fit, trainer


class Rows(pl.LightningModule):
    """Steps an SVI of a model with eight numbers for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        guide = AutoDelta(model, init_loc_fn=start)
        self.svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.svi.step(batch[0])


def peak_bytes(num_rows: int) -> int:
    """Returns what a rank's resident memory grows by at the peak of two steps with its share of the rows."""
    pyro.clear_param_store()
    backend = current()
    x = torch.ones(num_rows // backend.world_size, NUM_DIMS)
    options = {"plates": "rows", "local": {"*.z": 0}}
    before = forget_peak()
    rows = BatchSampler(range(len(x)), len(x), drop_last=False)
    loader = DataLoader(TensorDataset(x), sampler=rows, batch_size=None)
    fit(trainer(backend.world_size, "rows", options=options, max_epochs=2), Rows(), loader)
    return status_bytes("VmHWM") - before

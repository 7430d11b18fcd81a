"""The plate over cells is the one that a model lists, else the one whose size follows a batch's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from distopt.scvi import plate_of_cells

NUM_GENES = 5
X = torch.arange(8.0 * NUM_GENES).reshape(8, NUM_GENES)


def subsampled(x: Tensor) -> None:
    with pyro.plate("genes", NUM_GENES, dim=-1), pyro.plate("cells", len(X), subsample_size=len(x), dim=-2):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def as_large_as_a_batch(x: Tensor) -> None:
    with pyro.plate("genes", NUM_GENES, dim=-1), pyro.plate("batch", len(x), dim=-2):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def without_plates(x: Tensor) -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape).to_event(2), obs=x)


def model(function: Any, listed: str | None = None) -> Any:
    def loader(adata: Any, indices: Any, **options: Any) -> list[Tensor]:
        return [X[torch.as_tensor(indices)]]

    module = SimpleNamespace(model=function, _get_fn_args_from_batch=lambda batch: ((batch,), {}))
    if listed is not None:
        module.list_obs_plate_vars = {"name": listed, "input": [], "sites": {}}
    return SimpleNamespace(module=module, adata=SimpleNamespace(obs=X), _make_data_loader=loader)


def test_plate_of_cells_is_found_also_beside_as_many_genes() -> None:
    assert plate_of_cells(model(subsampled, "obs_plate")) == "obs_plate"
    assert plate_of_cells(model(subsampled, "")) == "cells"
    assert plate_of_cells(model(as_large_as_a_batch)) == "batch"
    with pytest.raises(ValueError, match=r"found no plate where .* DistoptStrategy\(\"rows\", plates=NAME\)"):
        plate_of_cells(model(without_plates))

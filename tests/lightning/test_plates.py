"""A plate that is as large as the batch is told from one that is as large by chance."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from distopt.lightning.plates import unscaled_plates

NUM_GENES = 4


def counts_model(batch: dict[str, Tensor]) -> None:
    x = batch["x"]
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("genes", NUM_GENES, dim=-1), pyro.plate("cells", len(x), dim=-2):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def scaled_model(batch: dict[str, Tensor]) -> None:
    x = batch["x"]
    with pyro.plate("genes", NUM_GENES, dim=-1), pyro.plate("cells", 100, subsample_size=len(x), dim=-2):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def of_one_size(batch: dict[str, Tensor]) -> None:
    assert len(batch["x"]) == NUM_GENES
    counts_model(batch)


@pytest.mark.parametrize("num_rows", [3, NUM_GENES, 5])
def test_plate_of_as_many_genes_as_rows_is_not_taken_for_one_of_rows(num_rows: int) -> None:
    x = torch.zeros(num_rows, NUM_GENES)
    assert unscaled_plates(counts_model, (), {"batch": {"x": x}}, num_rows) == ["cells"]
    assert unscaled_plates(scaled_model, ({"x": x},), {}, num_rows) == []


def test_model_of_one_number_of_rows_alone_has_all_plates_of_that_size() -> None:
    batch = {"x": torch.zeros(NUM_GENES, NUM_GENES)}
    assert sorted(unscaled_plates(of_one_size, (batch,), {}, NUM_GENES)) == ["cells", "genes"]


def test_generators_and_buffers_are_as_before() -> None:
    norm = nn.BatchNorm1d(NUM_GENES)
    state = torch.get_rng_state()

    def model(batch: dict[str, Tensor]) -> None:
        norm(batch["x"] + torch.rand(()))
        counts_model(batch)

    unscaled_plates(model, ({"x": torch.ones(NUM_GENES, NUM_GENES)},), {}, NUM_GENES)
    assert norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)

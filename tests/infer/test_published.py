"""Models from other people's packages, as they are, give the gradients of one process when their plates are sharded."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pytest
import torch
from pyro.contrib.mue.models import FactorMuE
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from distopt.infer import shard
from distopt.reduce.local import local_parameters
from tests.infer.one_process import assert_same, gradients_of_all, gradients_of_ranks

pytestmark = pytest.mark.usefixtures("same_noise_in_every_row")

SIZES = [3, 6, 4]
NUM_ITEMS = 7


def _irt(num_subjects: int) -> Any:
    """The two-parameter model of item response theory of the package py-irt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports pyro.contrib.autoguide, the old name
        models = pytest.importorskip("py_irt.models", reason="py-irt is not installed: pip install --no-deps py-irt")
    return models.TwoParamLog(priors="vague", num_items=NUM_ITEMS, num_subjects=num_subjects)


def _answers(first: int, num_subjects: int) -> tuple[Tensor, Tensor, Tensor]:
    """Who (counted from 0 within these subjects), which item, right or wrong."""
    who = torch.arange(num_subjects).repeat_interleave(NUM_ITEMS)
    item = torch.arange(NUM_ITEMS).repeat(num_subjects)
    return who, item, ((first + who) * 5 + item * 3) % 7 % 2 * 1.0


def test_item_response_model_and_its_own_guide_of_py_irt_split_over_subjects() -> None:
    starts = [sum(SIZES[:rank]) for rank in range(len(SIZES))]
    plates = ["thetas", "observe_data"]
    elbo = Trace_ELBO()

    def run_shard(rank: int) -> float:
        irt = _irt(SIZES[rank])
        model = shard(irt.model_vague, plates, num_shards=3)
        own = {"*_ability": 0}  # its guide states them outside the plate, without event_dim
        guide = shard(irt.guide_vague, "thetas", local=own, replicated=["*_diff", "*_slope"], num_shards=3)
        return float(elbo.loss_and_grads(model, guide, *_answers(starts[rank], SIZES[rank])))

    found = gradients_of_ranks(run_shard, range(3))
    entries = local_parameters()
    assert set(entries) == {"loc_ability", "scale_ability"}
    irt = _irt(sum(SIZES))
    loss = elbo.loss_and_grads
    expected = gradients_of_all(
        lambda answers: float(loss(irt.model_vague, irt.guide_vague, *answers)), _answers(0, sum(SIZES)), entries
    )
    assert_same(found, expected)


@pytest.mark.parametrize("guide", [AutoDelta, AutoNormal])
def test_factor_model_of_sequences_of_pyro_contrib_split_over_sequences(guide: Any) -> None:
    def start(site: dict[str, Any]) -> Tensor:
        return torch.full(site["fn"].shape(), 0.5)

    def make() -> FactorMuE:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return FactorMuE(data_length=5, alphabet_length=4, z_dim=2, batch_size=1, latent_seq_length=5)

    letters = (torch.arange(sum(SIZES))[:, None] * 3 + torch.arange(5) ** 2) % 4
    sequences = torch.nn.functional.one_hot(letters, 4).double()
    ones = torch.tensor(1.0)

    def run_shard(rows: Tensor) -> float:
        model = shard(make().model, "batch", num_shards=3)
        on_top = shard(guide(model, init_loc_fn=start), "batch", num_shards=3)
        return float(Trace_ELBO().loss_and_grads(model, on_top, rows, ones, ones))

    found = gradients_of_ranks(run_shard, sequences.split(SIZES))
    entries = local_parameters()
    assert entries and all("latent" in name for name in entries)

    def run_all(rows: Tensor) -> float:
        model = make().model
        return float(Trace_ELBO().loss_and_grads(model, guide(model, init_loc_fn=start), rows, ones, ones))

    assert_same(found, gradients_of_all(run_all, sequences, entries))
    assert pyro.get_param_store()

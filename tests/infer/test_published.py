"""Published models, unchanged, trained on several workers end where one Pyro process with all data ends."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.infer
import pytest
import torch
from pyro.contrib.mue.models import FactorMuE
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from distopt import backends, optim
from distopt.infer import SVI, shard
from tests.infer.one_process import same_draws
from tests.infer.sharded_models import parameters_of_all
from tests.workers import world

Step = Callable[[Any], float]
LR = 0.02


class Case:
    """A published model.

    Attributes:
        plates: its plates that are split over ranks.
        guide_options: for `shard` around the guide.
        sizes: by number of ranks, how many datapoints each holds.
    """

    plates: tuple[str, ...]
    guide_options: dict[str, Any] = {}
    sizes: dict[int, list[int]] = {1: [12], 2: [8, 4], 3: [4, 6, 2]}

    def make(self, num_rows: int) -> tuple[Any, Callable[[Any], Any]]:
        """Returns the model for so many datapoints, and what makes its guide of it."""
        raise NotImplementedError

    def batch(self, first: int, num_rows: int, step: int) -> tuple[Any, ...]:
        """Returns the arguments of model and guide for the datapoints from `first` on."""
        raise NotImplementedError


class Sequences(Case):
    """`FactorMuE` of pyro.contrib: a latent vector and a hidden Markov model for each sequence.

    Args:
        guide: An autoguide's class.
    """

    plates = ("batch",)

    def __init__(self, guide: Any) -> None:
        self._guide = guide

    def make(self, num_rows: int) -> tuple[Any, Callable[[Any], Any]]:
        torch.manual_seed(0)
        mue = FactorMuE(data_length=5, alphabet_length=4, z_dim=2, batch_size=1, latent_seq_length=5)
        return mue.model, lambda model: self._guide(model, init_loc_fn=_half)

    def batch(self, first: int, num_rows: int, step: int) -> tuple[Any, ...]:
        letters = (torch.arange(first, first + num_rows)[:, None] * 3 + torch.arange(5) ** 2) % 4
        one = torch.tensor(1.0)
        return torch.nn.functional.one_hot(letters, 4).double(), one, one


class Answers(Case):
    """The two-parameter model of item response theory of the package py-irt, with its own guide."""

    NUM_ITEMS = 7
    plates = ("thetas", "observe_data")
    # The guide states its parameters outside the plate and without event_dim.
    guide_options = {"local": {"*_ability": ("thetas", 0)}, "replicated": ["*_diff", "*_slope"]}

    def make(self, num_rows: int) -> tuple[Any, Callable[[Any], Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it imports pyro.contrib.autoguide, the old name
            models = pytest.importorskip("py_irt.models", reason="pip install --no-deps py-irt")
        irt = models.TwoParamLog(priors="vague", num_items=self.NUM_ITEMS, num_subjects=num_rows)
        return irt.model_vague, lambda model: irt.guide_vague

    def batch(self, first: int, num_rows: int, step: int) -> tuple[Any, ...]:
        who = torch.arange(num_rows).repeat_interleave(self.NUM_ITEMS)
        item = torch.arange(self.NUM_ITEMS).repeat(num_rows)
        return who, item, ((first + who) * 5 + item * 3) % 7 % 2 * 1.0


class Cells(Case):
    """Cell2location: cell types at places of a tissue, which takes its minibatch as an argument of indices.

    Each rank reads the same part of its places at each step, and all together what one process reads.
    """

    NUM_GENES, NUM_TYPES = 9, 5
    plates = ("obs_plate",)

    def make(self, num_rows: int) -> tuple[Any, Callable[[Any], Any]]:
        kind = "LocationModelLinearDependentWMultiExperimentLocationBackgroundNormLevelGeneAlphaPyroModel"
        signatures = np.random.default_rng(1).gamma(2.0, 1.0, (self.NUM_GENES, self.NUM_TYPES))
        published = getattr(_cell2location(), kind)(num_rows, self.NUM_GENES, self.NUM_TYPES, 2, signatures, n_groups=3)
        published = published.double()
        return published, lambda model: AutoNormal(
            model, init_loc_fn=_half, init_scale=0.1, create_plates=published.create_plates
        )

    def batch(self, first: int, num_rows: int, step: int) -> tuple[Any, ...]:
        counts = torch.from_numpy(np.random.default_rng(2).poisson(6.0, (12, self.NUM_GENES))).double()
        index = torch.arange(step % 2, num_rows, 2)  # every other one, so the part of all is that of any shard
        return counts[first + index], index, ((first + index) % 2)[:, None]


CASES: dict[str, Case] = {
    "FactorMuE AutoDelta": Sequences(AutoDelta),
    "FactorMuE AutoNormal": Sequences(AutoNormal),
    "py-irt": Answers(),
    "cell2location": Cells(),
}


def _half(site: dict[str, Any]) -> Tensor:
    return torch.full(site["fn"].shape(), 0.5)


def _cell2location() -> ModuleType:
    """The module of its model alone.

    Importing the package would need scvi-tools and all that it needs, of which the model's module uses the names of
    two columns of a data frame, in a method that is not called here; an empty module stands in for it.
    """
    if importlib.util.find_spec("cell2location") is None:
        pytest.skip("cell2location is not installed: pip install --no-deps cell2location")
    (folder,) = importlib.util.find_spec("cell2location").submodule_search_locations or ()
    path = Path(folder) / "models" / "_cell2location_module.py"
    spec = importlib.util.spec_from_file_location("cell2location_module", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    scvi = ModuleType("scvi")
    scvi.REGISTRY_KEYS = None  # type: ignore[attr-defined]
    # Not `patch.dict`, which takes out again what else is imported meanwhile: parts of NumPy can be loaded but once.
    known = sys.modules.get("scvi")
    sys.modules["scvi"] = scvi
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["scvi"]
        if known is not None:
            sys.modules["scvi"] = known
    return module


def train_in_pyro(case: str, num_steps: int) -> tuple[dict[str, Tensor], float]:
    """Returns parameters and last loss of Pyro alone, in this process, with all data."""
    chosen, num_rows = CASES[case], sum(CASES[case].sizes[1])
    with same_draws():
        pyro.clear_param_store()
        model, make_guide = chosen.make(num_rows)
        svi = pyro.infer.SVI(model, make_guide(model), pyro.optim.Adam({"lr": LR}), Trace_ELBO())
        losses = [svi.step(*chosen.batch(0, num_rows, step)) for step in range(num_steps)]
        return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, losses[-1]


def _run_shard(case: str, num_steps: int) -> tuple[dict[str, Any], float, int]:
    """One rank's part of it: parameters of all ranks, mean loss, and how many numbers of this rank stayed on it."""
    backend, chosen = backends.current(), CASES[case]
    sizes = chosen.sizes[backend.world_size]
    first, num_rows = sum(sizes[: backend.rank]), sizes[backend.rank]
    with same_draws():
        published, make_guide = chosen.make(num_rows)
        model = shard(published, chosen.plates, replicated=["*"])
        guide = make_guide(model)
        if chosen.guide_options:
            guide = shard(guide, chosen.plates[0], **chosen.guide_options)
        svi = SVI(model, guide, optim.DistributedOptimizer(optim.Adam({"lr": LR})), Trace_ELBO())
        losses = [svi.step(*chosen.batch(first, num_rows, step)) for step in range(num_steps)]
        store, params = pyro.get_param_store(), parameters_of_all()
        num_local = sum(store[name].numel() for name in params if store[name].shape != params[name].shape)
        return {name: value.numpy() for name, value in params.items()}, losses[-1], num_local


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case == "FactorMuE AutoNormal" else []) for case in CASES]
)
def test_published_model_trained_on_two_and_three_workers_has_the_parameters_of_one_pyro_process(case: str) -> None:
    expected, expected_loss = train_in_pyro(case, 40)
    for world_size in (2, 3):
        for params, loss, num_local in world("torch_dist", world_size).run(_run_shard, case, 40):
            assert params.keys() == expected.keys()
            assert num_local > 0, "nothing was sharded"
            assert loss == pytest.approx(expected_loss, rel=1e-9)
            for name, value in expected.items():
                np.testing.assert_allclose(params[name], value.numpy(), rtol=1e-6, atol=1e-9, err_msg=name)

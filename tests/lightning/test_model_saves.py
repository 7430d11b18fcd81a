"""A callback that saves models by itself, as scvi-tools' `SaveCheckpoint` does, saves once on several workers.

The class here does what that of scvi-tools does, which CI does not install; tests/scvi/test_resume.py has the real one.
"""

from __future__ import annotations

import os
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from distopt.backends import current
from distopt.lightning.model_saves import saving_on_rank_0
from tests.lightning.plans import TorchPlan, fit, loader, state_values, trainer
from tests.workers import world

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of much that is meant here


class SaveCheckpoint(ModelCheckpoint):  # type: ignore[misc]
    """Saves a model beside each checkpoint of the trainer, and removes that of the best."""

    def on_save_checkpoint(self, trainer: Any, *args: Any) -> None:
        path = self.format_checkpoint_name(self._monitor_candidates(trainer)).split(".ckpt")[0]
        trainer._model.save(path)

    def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        path = filepath.split(".ckpt")[0]
        if os.path.isdir(path):
            rmtree(path)

    def _update_best_and_save(self, *args: Any) -> None:
        super()._update_best_and_save(*args)
        if os.path.exists(self.best_model_path):
            os.remove(self.best_model_path)
        self.best_model_path = self.best_model_path.split(".ckpt")[0]


SaveCheckpoint.__module__ = "scvi.train._callbacks"


class Model:
    """A model of scvi-tools, as far as saving needs one; one that is saved twice is an error."""

    def __init__(self, plan: TorchPlan) -> None:
        self.module = plan.net
        self.is_trained_ = False

    def save(self, path: str) -> None:
        os.makedirs(path)
        torch.save(self.module.state_dict(), os.path.join(path, "model.pt"))


def _run_saving(folder: str) -> tuple[str, bool, dict[str, list[float]]]:
    torch.manual_seed(2)
    plan = TorchPlan(batch_norm=True)
    save = SaveCheckpoint(folder, "{epoch}", monitor="validated", mode="min", save_top_k=1)
    options: dict[str, Any] = {"callbacks": [save], "enable_checkpointing": True, "max_epochs": 4}
    trains = trainer(current().world_size, **options)
    trains._model = Model(plan)
    fit(trains, plan, loader(8), loader(6, shuffle=False))
    plan.net.load_state_dict(torch.load(os.path.join(save.best_model_path, "model.pt"), weights_only=True))
    return save.best_model_path, type(save) is SaveCheckpoint, state_values(plan)


def test_model_is_saved_on_rank_0_and_all_ranks_load_the_best(tmp_path: Path) -> None:
    first, second = world("torch_dist", 2).run(_run_saving, str(tmp_path))
    assert first == second
    assert first[1], "the callback is what it was"
    assert [each.name for each in tmp_path.iterdir()] == [Path(first[0]).name]


def test_callback_that_would_save_one_ranks_rows_is_refused_with_what_to_write() -> None:
    fake = SimpleNamespace(callbacks=[SaveCheckpoint()], world_size=2)
    with pytest.raises(ValueError, match=r"has its own rows alone .* call trainer.save_checkpoint\(PATH\)"):
        with saving_on_rank_0(fake, of_one_rank=True):
            pass

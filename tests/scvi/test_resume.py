"""Models of scvi-tools that are killed in `train()` resume by `ckpt_path`, stop early alike, and are saved once."""

from __future__ import annotations

import os
import re
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping

import distopt
from distopt.backends import current
from tests.scvi.models import CASES, cells, train, values
from tests.scvi.test_models import LIMIT_S, assert_near, assert_same, on_all
from tests.workers import backend_name, run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("scvi") is None, reason="scvi-tools is not installed: pip install scvi-tools"),
]
NUM_EPOCHS = 5
NAMES = ["Cell2location in minibatches", "AmortizedLDA", "RegressionModel"]


class SaveEpochs(Callback):  # type: ignore[misc]
    """Saves the trainer after each epoch, and kills this process in one that follows.

    Args:
        folder: Where.
        kill_in: The epoch; -1 for none.
    """

    def __init__(self, folder: str, kill_in: int) -> None:
        self._folder = folder
        self._kill_in = kill_in

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(f"{self._folder}/epoch={trainer.current_epoch}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.current_epoch == self._kill_in and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _run(name: str, folder: str, resume: str = "", kill_in: int = -1) -> dict[str, Any]:
    import scvi

    import distopt.lightning  # noqa: F401  # makes the strategy known

    scvi.settings.seed = 0
    model = CASES[name].make(cells())
    options: dict[str, Any] = {"callbacks": [SaveEpochs(folder, kill_in)], "strategy": "distopt"}
    if resume:
        options["ckpt_path"] = resume
    train(model, CASES[name], NUM_EPOCHS, device=current().world_size, **options)
    return values(model)


def _run_killed(name: str, folder: str) -> None:
    distopt.init(backend_name())
    _run(name, folder, kill_in=3)


@pytest.mark.parametrize("name", NAMES)
def test_killed_model_resumes_with_every_bit_and_on_other_numbers_of_workers(name: str, tmp_path: Path) -> None:
    killed = str(tmp_path / "killed")
    statuses, started = run_script("torch_dist", 2, _run_killed, name, killed, timeout_s=LIMIT_S, grace_s=60)
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, None), started.output()
    path = f"{killed}/epoch=2.ckpt"
    assert Path(path).is_dir() and not Path(killed, "epoch=3.ckpt").exists()

    first, second = on_all(2, _run, name, str(tmp_path / "whole"))
    assert_same(second, first)
    for resumed in on_all(2, _run, name, str(tmp_path / "resumed"), path):
        assert_same(resumed, first)
    if CASES[name].is_exact:
        for num_workers in (1, 3):
            for resumed in on_all(num_workers, _run, name, str(tmp_path / f"on {num_workers}"), path):
                assert_near(resumed, first)


def _run_stopping(name: str) -> tuple[int, float]:
    import scvi

    import distopt.lightning  # noqa: F401  # makes the strategy known

    scvi.settings.seed = 0
    model = CASES[name].make(cells())
    stopping = EarlyStopping("elbo_train", patience=2, check_on_train_epoch_end=True)
    train(model, CASES[name], 40, callbacks=[stopping], strategy="distopt", device=current().world_size)
    return model.trainer.current_epoch, float(model.trainer.callback_metrics["elbo_train"])


@pytest.mark.parametrize("name", ["Cell2location in minibatches", "RegressionModel"])
def test_training_stops_at_the_epoch_at_which_one_process_stops(name: str) -> None:
    ((epoch, elbo),) = on_all(1, _run_stopping, name)
    assert 2 < epoch < 40
    for num_workers in (2, 3):
        for stopped, reached in on_all(num_workers, _run_stopping, name):
            assert stopped == epoch
            assert reached == pytest.approx(elbo, rel=1e-5)


class Remember(Callback):  # type: ignore[misc]
    """Keeps the values of each epoch's end.

    Args:
        model: Of scvi-tools.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.epochs: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs.append({name: value.copy() for name, value in values(self._model).items()})


def _run_saving(folder: str) -> tuple[str, dict[str, Any], dict[str, Any], bool]:
    import scvi

    import distopt.lightning  # noqa: F401  # makes the strategy known

    scvi.settings.seed = 0
    data = cells()
    model = CASES["AmortizedLDA"].make(data)
    save = scvi.train.SaveCheckpoint(folder, monitor="elbo_train", save_top_k=2, save_on_train_epoch_end=True)
    remember = Remember(model)
    options = {"callbacks": [remember, save], "enable_checkpointing": True}
    train(model, CASES["AmortizedLDA"], 6, strategy="distopt", device=current().world_size, **options)
    best = int(re.findall(r"epoch=(\d+)", save.best_model_path)[0])
    loaded = scvi.model.AmortizedLDA.load(save.best_model_path, adata=data, accelerator="cpu")
    return save.best_model_path, remember.epochs[best], values(loaded), type(save) is scvi.train.SaveCheckpoint


def test_save_checkpoint_of_scvi_tools_saves_once_and_every_worker_knows_the_best_model(tmp_path: Path) -> None:
    (path, first, loaded, is_plain), (other_path, second, loaded_by_other, _) = on_all(2, _run_saving, str(tmp_path))
    assert path == other_path and Path(path, "model.pt").is_file()
    # As in one process, a save that was not the best one leaves the trainer's checkpoint beside it.
    assert sum(each.is_dir() and each.suffix != ".ckpt" for each in tmp_path.iterdir()) == 2
    assert is_plain
    assert_same(loaded, loaded_by_other)
    # Statistics of batch norm are averaged for the save.
    assert_near(loaded, {name: np.mean([first[name], second[name]], axis=0) for name in loaded})
    assert_same(*({k: v for k, v in each.items() if "running" not in k and k in loaded} for each in (first, loaded)))

"""A run that is killed and resumed by `ckpt_path` ends with the numbers of one that was not."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pyro.infer import SVI, Trace_ELBO

import distopt.infer
from distopt.backends import current
from distopt.checkpoint import CheckpointError
from distopt.infer import gather_local
from distopt.optim import Adam, DistributedOptimizer
from tests.lightning.plans import (
    SviPlan,
    TorchPlan,
    X,
    fit,
    global_model,
    loader,
    local_model,
    state_values,
    store_values,
    trainer,
)
from tests.workers import run_script, world

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of much that is meant here
SIZES = {1: (23,), 2: (8, 15), 3: (4, 12, 7)}


class CountingPlan(SviPlan):
    """Has what a file of Lightning lacks: a counter, and a module that is frozen after the first epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_batches = 0
        self.norm = torch.nn.BatchNorm1d(1).double()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == 1:
            self.norm.eval()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.num_batches += 1
        self.norm(batch[0][:, None])
        super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validated", self.svi.evaluate_loss(*batch, **self._options))


class Killed(Callback):
    """Kills the process, or stops, before a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def _fit(kind: str, folder: str, every: str, resume: str = "", kill_at: int = -1, noisy: bool = True) -> dict[str, Any]:
    """Trains 4 epochs of 3 batches; returns all that training changes."""
    pyro.clear_param_store()
    pyro.set_rng_seed(11)
    world_size = current().world_size
    steps = {"every_n_train_steps": 1} if every == "step" else {"every_n_epochs": 1}
    save = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **steps)
    callbacks = [save, *([Killed(kill_at)] if kill_at >= 0 else [])]
    options: dict[str, Any] = {"callbacks": callbacks, "enable_checkpointing": True, "max_epochs": 4}
    resumed = {"ckpt_path": resume} if resume else {}
    data = [loader(8), loader(8, shuffle=False)]

    if kind == "torch":
        plan: Any = TorchPlan(batch_norm=True)
        fit(trainer(world_size, gradient_clip_val=0.05, **options), plan, *data, **resumed)
        return state_values(plan) | {"validated": plan.validated[-2:]}

    if kind == "rows":
        start = sum(SIZES[world_size][: current().rank])
        rows = slice(start, start + SIZES[world_size][current().rank])
        plan = CountingPlan(model=local_model, num_rows=rows.stop - rows.start)
        fit(
            trainer(world_size, "rows", options={"plates": "rows"}, **options),
            plan,
            loader(23, rows=rows, shuffle=False),
            **resumed,
        )
        local = {name: value.reshape(-1).tolist() for name, value in gather_local("z").items()}
        return local | {"loc": store_values()["AutoDelta.loc"]}

    plan = CountingPlan(model=local_model, num_rows=23, noisy=noisy)
    fit(trainer(world_size, **options), plan, *data, **resumed)
    lr = [each.optimizer.param_groups[0]["lr"] for each in plan.scheduler.optim_objs.values()]
    others = {"lr": lr[:1], "num_batches": [plan.num_batches], "training": [plan.norm.training]}
    return store_values() | state_values(plan.norm) | others


# With rows there is one batch in an epoch. A checkpoint after the last batch is one within the epoch for Lightning,
# which then trains that epoch again.
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "every"), [("noisy", "epoch"), ("noisy", "step"), ("rows", "epoch"), ("torch", "epoch"), ("torch", "step")]
)
def test_resumed_run_has_every_bit_of_one_that_was_not_interrupted(kind: str, every: str, tmp_path: Path) -> None:
    first, second = world("torch_dist", 2).run(_fit, kind, str(tmp_path / "a"), every)
    if kind != "rows":
        assert first.pop("validated", 0) == second.pop("validated", 0)
    number = 2 if kind == "rows" else 6 if every == "epoch" else 5
    resume = str(tmp_path / "a" / f"step={number}.ckpt")
    again = world("torch_dist", 2).run(_fit, kind, str(tmp_path / "b"), every, resume)
    for each in again:
        each.pop("validated", None)
    assert again == [first, second]


class TwoSvis(SviPlan):
    """Steps two SVIs in each batch, with an optimizer each."""

    def _make(self) -> None:
        self.svis = [
            SVI(global_model, partial(self._guess, name), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()) for name in "ab"
        ]

    @staticmethod
    def _guess(name: str, x: torch.Tensor, index: torch.Tensor) -> None:
        for site in ("loc", "scale"):
            pyro.sample(site, dist.Delta(pyro.param(f"{site} of {name}", X.new_tensor(0.7))))

    def on_train_epoch_end(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for svi in self.svis:
            svi.step(*batch)
        self.optimizers().step()


def undisturbed_and_resumed(plan: Any, folder: Path) -> list[dict[str, list[float]]]:
    """Returns the parameters after four epochs, and after a second run that begins with the checkpoint of step 6."""
    results = []
    for resume in ("", str(folder / "step=6.ckpt")):
        pyro.clear_param_store()
        pyro.set_rng_seed(11)
        save = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", every_n_epochs=1)
        options: dict[str, Any] = {"callbacks": [save], "enable_checkpointing": True, "max_epochs": 4}
        fit(trainer(1, **options), plan(), loader(8), **({"ckpt_path": resume} if resume else {}))
        results.append(store_values())
    return results


def test_two_svis_resume_each_with_its_own_optimizer(tmp_path: Path) -> None:
    undisturbed, resumed = undisturbed_and_resumed(TwoSvis, tmp_path)
    assert len(undisturbed) == 4 and resumed == undisturbed


class NewOptimizers(SviPlan):
    """Makes a new optimizer in some epochs, for the same SVI."""

    every = 1

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch % self.every == 0:
            self.svi = SVI(self._model, self._guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())

    def on_train_epoch_end(self) -> None:
        pass

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


def _fit_new_optimizers(folder: Path, every: int, **resumed: Any) -> None:
    plan = NewOptimizers()
    plan.every = every
    save = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", every_n_epochs=1)
    fit(trainer(1, callbacks=[save], enable_checkpointing=True), plan, loader(8), **resumed)


# It resumed with the state of the first one.
def test_plan_that_makes_new_optimizers_is_not_resumed_with_the_state_of_another_one(tmp_path: Path) -> None:
    pyro.clear_param_store()
    _fit_new_optimizers(tmp_path, 1)
    expected = store_values()
    pyro.clear_param_store()
    path = str(tmp_path / "step=6.ckpt")
    with pytest.raises(
        CheckpointError, match=r"1 optimizer\(s\) of SVIs had stopped stepping.*Make the optimizer once"
    ):
        _fit_new_optimizers(tmp_path / "again", 1, ckpt_path=path)

    plan = NewOptimizers()
    trainer(1).validate(plan, loader(8), ckpt_path=path, verbose=False)
    before = store_values()
    fit(trainer(1, max_epochs=1), plan, loader(8))
    assert len(before) == 2 and before != expected != store_values()

    _fit_new_optimizers(tmp_path / "once", 5)
    _fit_new_optimizers(tmp_path / "once-again", 5, ckpt_path=str(tmp_path / "once" / "step=6.ckpt"))


def test_saving_warns_once_of_a_checkpoint_that_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="had stopped stepping") as warned:
        plan = NewOptimizers()
        save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", every_n_epochs=1)
        trainer(1, callbacks=[save], enable_checkpointing=True).fit(plan, loader(8))
    assert sum("had stopped stepping" in str(each.message) for each in warned) == 1


class DistributedPlan(SviPlan):
    """Steps an SVI of distopt's with an optimizer that is distributed already."""

    def _make(self) -> None:
        optimizer = DistributedOptimizer(Adam({"lr": 0.1}))
        self.svi = distopt.infer.SVI(self._model, self._guide, optimizer, Trace_ELBO())

    def on_train_epoch_end(self) -> None:
        pass


# Its moments were not in the checkpoint.
def test_svi_of_distopt_with_a_distributed_optimizer_resumes_with_its_state(tmp_path: Path) -> None:
    undisturbed, resumed = undisturbed_and_resumed(DistributedPlan, tmp_path)
    assert resumed == undisturbed


def without_statistics(values: dict[str, Any]) -> dict[str, Any]:
    """Those of batch norm are means of shares, with another variance than whole batches."""
    return {name: value for name, value in values.items() if "running" not in name}


def near(expected: dict[str, Any]) -> dict[str, Any]:
    return {name: pytest.approx(value, rel=1e-6) for name, value in expected.items()}


@pytest.mark.parametrize("kind", ["rows", "delta"])
def test_run_resumes_on_another_number_of_workers(kind: str, tmp_path: Path) -> None:
    options = {"noisy": False}
    expected = _fit(kind, str(tmp_path / "a"), "epoch", **options)
    number = 2 if kind == "rows" else 6
    path = str(tmp_path / "a" / f"step={number}.ckpt")
    for values in world("torch_dist", 2).run(_fit, kind, str(tmp_path / "b"), "epoch", path, -1, False):
        assert {
            k: pytest.approx(v, rel=1e-6) for k, v in expected.items() if "running" not in k
        }.items() <= values.items()
    path = str(tmp_path / "b" / f"step={number + (1 if kind == 'rows' else 3)}.ckpt")
    values = _fit(kind, str(tmp_path / "c"), "epoch", path, **options)
    assert without_statistics(values) == near(without_statistics(expected))


def _run_killed(folder: str, kill_at: str, resume: str) -> None:
    import distopt

    distopt.init()
    values = _fit("noisy", folder, "step", resume, int(kill_at))
    if current().rank == 0:
        Path(folder, "values.json").write_text(json.dumps(values))


@pytest.mark.slow
def test_run_of_real_processes_that_are_killed_resumes_with_every_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script("torch_dist", 2, _run_killed, str(whole), "-1", "")[0] == [0, 0]
    statuses, _ = run_script("torch_dist", 2, _run_killed, str(killed), "7", "")
    assert statuses == [-signal.SIGKILL] * 2
    newest = max(killed.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert newest.name == "step=7.ckpt"
    assert run_script("torch_dist", 2, _run_killed, str(killed), "-1", str(newest))[0] == [0, 0]
    assert (whole / "values.json").read_text() == (killed / "values.json").read_text()


def _run_early_stopping(folder: str, keep: int, resume: str) -> tuple[int, list[str], float]:
    torch.manual_seed(5)
    plan = TorchPlan()
    stopping = EarlyStopping("validated", min_delta=2e-2, patience=1)
    best = ModelCheckpoint(folder, monitor="validated", save_top_k=keep, save_last=True, filename="{epoch}")
    options: dict[str, Any] = {"callbacks": [stopping, best], "enable_checkpointing": True, "max_epochs": 30}
    fit(trainer(current().world_size, **options), plan, loader(8), loader(6, shuffle=False), ckpt_path=resume or None)
    names = sorted(path.name for path in Path(folder).iterdir())
    with_best = trainer(current().world_size)
    with_best.validate(TorchPlan(), loader(6, shuffle=False), ckpt_path=best.best_model_path, verbose=False)
    assert float(with_best.callback_metrics["validated"]) == pytest.approx(float(best.best_model_score), rel=1e-12)
    return plan.current_epoch, names, float(best.best_model_score)


def test_best_and_last_are_kept_and_early_stopping_counts_on(tmp_path: Path) -> None:
    expected = _run_early_stopping(str(tmp_path / "one"), 1, "")
    assert len(expected[1]) == 2 and expected[1][1] == "last.ckpt"
    first, second = world("torch_dist", 2).run(_run_early_stopping, str(tmp_path / "two"), -1, "")
    assert first == second
    assert first[0] == expected[0] and first[2] == pytest.approx(expected[2], rel=1e-7)
    resumed = _run_early_stopping(str(tmp_path / "two"), -1, str(tmp_path / "two" / "epoch=1.ckpt"))
    assert resumed[0] == expected[0]


def test_nothing_of_a_checkpoint_is_pickled_and_what_is_not_plain_is_refused_by_name(tmp_path: Path) -> None:
    class Configured(TorchPlan):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

    _fit("torch", str(tmp_path / "a"), "epoch")
    names = {path.suffix for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert names <= {".gz", ".safetensors", ".json", ".lock", ""}, names

    save = ModelCheckpoint(str(tmp_path / "b"))
    with pytest.raises(
        CheckpointError, match=r"hyper_parameters/activation: .*save_hyperparameters\(ignore=\['activation'\]\)"
    ):
        fit(trainer(1, callbacks=[save], enable_checkpointing=True), Configured(torch.nn.ReLU), loader(8))
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        fit(trainer(1), TorchPlan(), loader(8), ckpt_path=str(tmp_path / "missing.ckpt"))
    assert len(X) == 23

"""Small LightningModules, written as users and libraries write them: none of them knows of distopt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from distopt.lightning import DistoptStrategy

NUM_ROWS = 23
X = torch.linspace(-1.0, 3.0, NUM_ROWS, dtype=torch.float64)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def global_model(x: Tensor, index: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 10.0))
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", NUM_ROWS, subsample=index):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def batch_sized_model(x: Tensor, index: Tensor) -> None:
    """Nothing says how many rows there are in all, as in scvi-tools' Decipher."""
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 10.0))
    with pyro.plate("batch", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def local_model(x: Tensor, index: Tensor, num_rows: int) -> None:
    """A latent variable for each row, as cell2location has; `num_rows` are this rank's."""
    loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 10.0))
    with pyro.plate("rows", num_rows, subsample=index):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def local_plates(x: Tensor, index: Tensor, num_rows: int) -> Any:
    """The guide's plate, which selects the variables of the rows of a batch."""
    return pyro.plate("rows", num_rows, subsample=index, dim=-1)


def delta_guide(model: Callable[..., Any]) -> Any:
    values = {"loc": torch.tensor(0.3, dtype=torch.float64), "scale": torch.tensor(1.2, dtype=torch.float64)}

    def start(site: Any) -> Tensor:
        return values.get(site["name"], X.new_zeros(())).expand(site["fn"].shape()).clone()

    return AutoDelta(model, init_loc_fn=start, create_plates=local_plates if model is local_model else None)


class SviPlan(pl.LightningModule):
    """Steps an SVI by hand, as scvi's PyroTrainingPlan does, with a torch optimizer that only counts.

    Args:
        model: Of Pyro.
        home: Where the SVI is made or the optimizer is stepped.
        noisy: Whether the guide draws.
        options: Arguments of the model beside a batch.
    """

    def __init__(self, model: Any = global_model, home: str = "init", noisy: bool = False, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.counter = nn.Parameter(torch.zeros(1))
        self._model = model
        self._home = home
        self._options = options
        self._guide = AutoNormal(model, create_plates=local_plates) if noisy else delta_guide(model)
        self.scheduler = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
        )
        self.svi: Any = None
        self.seen: list[list[float]] = []
        self.losses: list[float] = []
        if home in ("init", "replaced"):
            self._make()

    def _make(self) -> None:
        self.svi = SVI(self._model, self._guide, self.scheduler, Trace_ELBO())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([self.counter])

    def on_train_start(self) -> None:
        if self._home == "train start":
            self._make()

    def on_train_epoch_start(self) -> None:
        self.seen.append([])
        if self._home == "replaced" and self.current_epoch == 1:
            self._make()

    def on_train_epoch_end(self) -> None:
        self.scheduler.step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, index = batch
        if not self.seen:  # resumed within an epoch, which then has no start
            self.seen.append([])
        self.seen[-1] += index.tolist()
        if self._home == "no svi":
            self._step_by_hand(x, index)
        else:
            if self.svi is None:
                self._make()
            self.losses.append(self.svi.step(x, index, **self._options))
        self.optimizers().step()

    def _step_by_hand(self, x: Tensor, index: Tensor) -> None:
        with pyro.poutine.trace(param_only=True) as trace:
            self.losses.append(Trace_ELBO().loss_and_grads(self._model, self._guide, x, index))
        params = {site["value"].unconstrained() for site in trace.trace.nodes.values()}
        self.scheduler(params)
        pyro.infer.util.zero_grads(params)


class TorchPlan(pl.LightningModule):
    """Plain torch: a regression with batch norm, by Lightning or by hand.

    Args:
        how: `automatic`, `manual_backward`, or `backward`, which Lightning does not see.
        batch_norm: Whether the network has one.
    """

    def __init__(self, how: str = "automatic", batch_norm: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = how == "automatic"
        self._how = how
        self.net = nn.Sequential(
            nn.Linear(1, 3), *([nn.BatchNorm1d(3)] if batch_norm else []), nn.Tanh(), nn.Linear(3, 1)
        )
        self.net.double()
        self.validated: list[float] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def _loss(self, batch: Any) -> Tensor:
        x = batch[0][:, None]
        return nn.functional.mse_loss(self.net(x), x.sin())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self._loss(batch)
        if self._how == "automatic":
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if self._how == "manual_backward":
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("validated", self._loss(batch))
        self.log("drawn", torch.rand(()))

    def on_validation_epoch_end(self) -> None:
        self.validated.append(float(self.trainer.callback_metrics["drawn"]))
        self.validated.append(float(self.trainer.callback_metrics["validated"]))


def loader(batch_size: int = 5, shuffle: bool = True, rows: slice = slice(None), **options: Any) -> Any:
    index = torch.arange(len(X[rows]))
    return DataLoader(TensorDataset(X[rows], index), batch_size=batch_size, shuffle=shuffle, **options)


def trainer(num_workers: int, split: Any = "batches", *, options: Any = None, **arguments: Any) -> pl.Trainer:
    """A trainer with the strategy, which says nothing."""
    arguments = {"max_epochs": 3, **QUIET, **arguments}
    return pl.Trainer(strategy=DistoptStrategy(split, **(options or {})), devices=num_workers, **arguments)


def fit(trainer: pl.Trainer, plan: pl.LightningModule, *loaders: Any, **arguments: Any) -> None:
    """Fits without the warnings that Lightning has about small loaders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(plan, *loaders, **arguments)


def store_values() -> dict[str, list[float]]:
    return {name: value.detach().reshape(-1).tolist() for name, value in sorted(pyro.get_param_store().items())}


def state_values(module: nn.Module) -> dict[str, list[float]]:
    return {name: value.double().reshape(-1).tolist() for name, value in module.state_dict().items()}

"""Optimizer, objective and loggers of a configuration: distopt's and the user's, or an error that names the key."""

from __future__ import annotations

import io
from typing import Any

import pyro
import pyro.infer
import pytest
import torch
import yaml
from rich.console import Console

from distopt.config import ConfigError, RunConfig, parse_config
from distopt.train.components import make_loggers, make_loss, make_optimizer
from distopt.train.loggers import JsonLinesLogger, Logger, ProgressLogger, TensorBoardLogger


class SignDescent(torch.optim.Optimizer):
    """Steps by the sign of the gradient."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad.sign())


def sgd_by_function(params: Any, **args: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **args)


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """Halves the learning rate at each step."""

    def get_lr(self) -> list[float]:
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


def plateau_by_function(optimizer: torch.optim.Optimizer, **args: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **args)


class TwiceElbo(pyro.infer.Trace_ELBO):
    """Twice the usual loss."""

    def loss(self, *args: Any, **kwargs: Any) -> float:
        return 2 * float(super().loss(*args, **kwargs))


def no_elbo(num_particles: int) -> str:
    return "nothing"


class Post(Logger):
    """A logger with an argument."""

    def __init__(self, url: str = "") -> None:
        self.url = url


def config(**keys: Any) -> RunConfig:
    return parse_config(yaml.safe_dump({"name": "x", "task": "a:B"} | keys))


def optim(**keys: Any) -> RunConfig:
    return config(optim=keys)


def values(chosen: RunConfig, num_steps: int = 3) -> list[float]:
    """The parameter after each step with gradient 1, starting from 0; the schedule gets the step as its loss."""
    pyro.clear_param_store()
    optimizer, step_schedule = make_optimizer(chosen)
    param = pyro.param("x", torch.zeros(1)).unconstrained()
    seen = []
    for step in range(num_steps):
        param.grad = torch.ones(1)
        optimizer([param])
        step_schedule(optimizer, float(step))  # type: ignore[arg-type]  # here it need not be distributed
        seen.append(round(param.item(), 6))
    return seen


def test_shipped_optimizer_and_schedule() -> None:
    assert values(optim(name="SGD", args={"lr": 1.0})) == [-1.0, -2.0, -3.0]
    halving = {"name": "ExponentialLR", "args": {"gamma": 0.5}}
    assert values(optim(name="SGD", args={"lr": 1.0}, scheduler=halving)) == [-1.0, -1.5, -1.75]


@pytest.mark.parametrize(
    ("name", "lr", "expected"),
    [("SignDescent", 0.25, [-0.25, -0.5, -0.75]), ("sgd_by_function", 1.0, [-1.0, -2.0, -3.0])],
)
def test_optimizer_of_the_user(name: str, lr: float, expected: list[float]) -> None:
    assert values(optim(name=f"{__name__}:{name}", args={"lr": lr})) == expected


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"name": f"{__name__}:Halving"}, [-1.0, -1.5, -1.75]),
        # The loss rises, so with no patience every step after the first reduces the rate.
        ({"name": f"{__name__}:plateau_by_function", "args": {"patience": 0, "factor": 0.5}}, [-1.0, -2.0, -2.5]),
    ],
)
def test_schedule_of_the_user(scheduler: dict[str, Any], expected: list[float]) -> None:
    assert values(optim(name="SGD", args={"lr": 1.0}, scheduler=scheduler)) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"args": {"lrr": 0.1}}, r"optim\.args: .*'lrr'"),
        ({"args": {"lr": -1}}, r"optim\.args: .*learning rate: -1"),
        ({"scheduler": {"name": "StepLR"}}, r"optim\.scheduler\.args: .*'step_size'"),
        ({"name": f"{__name__}:Halving", "args": {}}, r"optim\.args: "),
        ({"name": f"{__name__}:SignDescnt"}, r"optim\.name: .* did you mean SignDescent\?"),
        ({"name": "builtins_like:dict"}, r"optim\.name: .*No module named 'builtins_like'"),
        ({"scheduler": {"name": f"{__name__}:sgd_by_function"}}, r"optim\.scheduler"),
        (
            {"scheduler": {"name": f"{__name__}:Post"}},
            r"optim\.scheduler.*which makes a Post, expected a torch\.optim\.",
        ),
    ],
)
def test_what_the_optimizer_refuses_is_reported_with_its_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(optim(**({"name": "Adam"} | keys)))


def test_name_that_an_older_torch_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from distopt.train import components

    monkeypatch.delitem(components.OPTIMIZERS, "Muon")
    with pytest.raises(ConfigError, match=r"optim\.name: found Muon, which torch .* does not have"):
        make_optimizer(optim(name="Muon", args={"lr": 0.1}))


class Stepless(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"name": "Adam", "args": {"eps": 1e-6, "lr": "x"}}, r"optim\.args: found \{eps: 1e-06, lr: x\}: .*'str'"),
        ({"name": "Adam", "args": {"beta": 0.9}}, r"optim\.args: found \{beta: 0\.9\}: .* argument 'beta'"),
        ({"name": f"{__name__}:Stepless", "args": {}}, r"optim\.name: .*:Stepless has no step\(closure=None\)"),
        (
            {"name": "Adam", "args": {}, "scheduler": {"name": "StepLR", "args": {"size": 3}}},
            r"optim\.scheduler\.args: found \{size: 3\}: .* argument 'size'",
        ),
    ],
)
def test_optimizer_that_is_refused_is_reported_with_its_key_and_arguments(chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(optim(**chosen))


def test_objective_is_shipped_or_the_users() -> None:
    shipped = make_loss(config(train={"loss": "TraceEnum_ELBO", "loss_args": {"max_plate_nesting": 2}}))
    assert isinstance(shipped, pyro.infer.TraceEnum_ELBO) and shipped.max_plate_nesting == 2
    doubled = make_loss(config(train={"loss": f"{__name__}:TwiceElbo", "num_particles": 3}))
    assert isinstance(doubled, TwiceElbo) and doubled.num_particles == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"loss_args": {"max_nesting": 1}}, r"train\.loss_args: .*'max_nesting'"),
        ({"loss": f"{__name__}:Post"}, r"train\.loss_args: .*'num_particles'"),
        (
            {"loss": f"{__name__}:no_elbo"},
            r"train\.loss: found .*:no_elbo, which makes a str, expected a pyro\.infer",
        ),
    ],
)
def test_objective_that_is_refused_is_reported_with_its_key(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loss(config(train=train))


def test_loggers_of_the_user_come_after_those_of_distopt() -> None:
    log = {"loggers": [f"{__name__}:Post", {"name": f"{__name__}:Post", "args": {"url": "u"}}]}
    made = make_loggers(config(log=log), Console(file=io.StringIO()))
    assert [type(each) for each in made] == [JsonLinesLogger, TensorBoardLogger, ProgressLogger, Post, Post]
    assert [each.url for each in made if isinstance(each, Post)] == ["", "u"]
    without = make_loggers(config(log={"tensorboard": False}), Console(file=io.StringIO()))
    assert [type(each) for each in without] == [JsonLinesLogger, ProgressLogger]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": f"{__name__}:Post", "args": {"ulr": 1}}, r"log\.loggers\.0\.args: .*'ulr'"),
        (f"{__name__}:Pst", r"log\.loggers\.0: .* did you mean Post\?"),
        (f"{__name__}:config", r"log\.loggers\.0: .*makes a RunConfig, expected a distopt\.train\.loggers\.Logger"),
    ],
)
def test_logger_that_is_refused_is_reported_with_its_key(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loggers(config(log={"loggers": [entry]}), Console(file=io.StringIO()))

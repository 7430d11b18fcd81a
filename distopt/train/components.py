"""The optimizer, the objective and the loggers that a configuration names: distopt's, or the user's as `module:Name`.

Each function here takes what it names for a trial: an argument that it does not accept is reported before the first
step, with the key of the configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import pyro.infer
import torch
from rich.console import Console

from distopt.config import ConfigError, RunConfig
from distopt.config.plugins import is_reference, load_reference
from distopt.optim import DistributedOptimizer, PyroLRScheduler, PyroOptim, by_name
from distopt.optim.arguments import Args
from distopt.optim.lr_scheduler import metric_name
from distopt.optim.pytorch_optimizers import OPTIMIZERS, SCHEDULERS
from distopt.train.loggers import JsonLinesLogger, Logger, ProgressLogger, TensorBoardLogger
from distopt.train.trainjob_status import trainjob_logger

StepSchedule: TypeAlias = Callable[[DistributedOptimizer, float | None], None]
"""Takes a step of the optimizer's learning-rate schedule, given the loss."""


def make_optimizer(config: RunConfig) -> tuple[PyroOptim, StepSchedule]:
    """Returns the optimizer that the configuration names, and a function that steps its schedule.

    Raises:
        ConfigError: There is no such optimizer or schedule, or it does not accept its arguments.
    """
    chosen = config.optim
    args = dict(chosen.args)
    optim_args: Args = by_name(args, chosen.args_by_name) if chosen.args_by_name else args
    constructor = _find(chosen.name, OPTIMIZERS, "optim.name")

    # The optimizer makes torch's optimizers when it first sees a parameter. One is made here on trial, because else the
    # first step would be the first to find a misspelt argument, after the data were read and all ranks had met. The
    # parameter has two dimensions since Muon refuses others.
    with refused("optim.args", given=args):
        optimizer = PyroOptim(constructor, optim_args, chosen.clip.args(), nonfinite=chosen.nonfinite)
        trial = constructor([torch.zeros(1, 1)], **args)
    for pattern, more in chosen.args_by_name.items():
        with refused(f"optim.args_by_name.{pattern}"):
            constructor([torch.zeros(1, 1)], **{**args, **more})
    _check_kind(trial, torch.optim.Optimizer, chosen.name, "optim.name")
    if inspect.unwrap(type(trial).step) is inspect.unwrap(torch.optim.Optimizer.step):  # torch wraps each class's step
        raise ConfigError([f"optim.name: {chosen.name} has no step(closure=None), which takes the step"])
    if chosen.scheduler is None:
        return optimizer, lambda _optimizer, _loss: None

    make = _find(chosen.scheduler.name, SCHEDULERS, "optim.scheduler.name")
    with refused("optim.scheduler.args", given=chosen.scheduler.args):
        scheduler_args = {"optimizer": constructor, "optim_args": optim_args, **chosen.scheduler.args}
        optimizer = PyroLRScheduler(make, scheduler_args, chosen.clip.args(), nonfinite=chosen.nonfinite)
        schedule = optimizer._construct([torch.zeros(1, 1)], args)
    _check_kind(schedule, torch.optim.lr_scheduler.LRScheduler, chosen.scheduler.name, "optim.scheduler.name")
    _check_length(schedule, config)

    # Schedules such as ReduceLROnPlateau follow the loss; a user's may, too, whatever its class.
    if metric_name(schedule) is not None:
        return optimizer, lambda made, loss: made.step(loss)
    return optimizer, lambda made, _loss: made.step()


def _check_length(schedule: Any, config: RunConfig) -> None:
    """Refuses a schedule of a fixed length that ends before the run does: torch would raise at that step."""
    for each in [schedule, *vars(schedule).get("_schedulers", ())]:
        if not isinstance(each, torch.optim.lr_scheduler.OneCycleLR):
            continue
        assert config.optim.scheduler is not None
        needed = config.train.num_steps // config.optim.scheduler.every_steps
        if each.total_steps < needed:
            raise ConfigError(
                [
                    f"optim.scheduler.args.total_steps: found {each.total_steps:,}, but train.num_steps makes "
                    f"{needed:,} steps of the schedule; set it to {needed} or to ${{train.num_steps}}"
                ]
            )


def make_loss(config: RunConfig) -> pyro.infer.ELBO:
    """Returns the objective that the configuration names.

    Raises:
        ConfigError: There is no such objective, or it does not accept its arguments.
    """
    name = config.train.loss
    make = load_reference(name, "train.loss") if is_reference(name) else getattr(pyro.infer, name)
    with refused("train.loss_args", given=config.train.loss_args):
        loss = make(num_particles=config.train.num_particles, **config.train.loss_args)
    _check_kind(loss, pyro.infer.ELBO, name, "train.loss")
    return loss


def make_loggers(config: RunConfig, console: Console) -> list[Logger]:
    """Returns the loggers of rank 0: distopt's, then the user's.

    Raises:
        ConfigError: There is no such logger, or it does not accept its arguments.
    """
    # `metrics.jsonl` is always written: the report is made of it.
    loggers: list[Logger] = [JsonLinesLogger()]
    if config.log.tensorboard:
        loggers.append(TensorBoardLogger())
    loggers.append(ProgressLogger(console))
    if (trainjob := trainjob_logger()) is not None:
        loggers.append(trainjob)

    for index, entry in enumerate(config.log.loggers):
        make = load_reference(entry.name, f"log.loggers.{index}")
        with refused(f"log.loggers.{index}.args", given=entry.args):
            logger = make(**entry.args)
        _check_kind(logger, Logger, entry.name, f"log.loggers.{index}")
        loggers.append(logger)
    return loggers


@contextmanager
def refused(
    key: str, kinds: tuple[type[Exception], ...] = (TypeError, ValueError), *, given: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turns what a library raises for a value of the configuration into a `ConfigError` that names the key.

    Args:
        key: The key.
        kinds: What is meant for the user; everything else is a defect.
        given: The arguments that stand there, to be shown: many a message names neither argument nor value.
    """
    try:
        yield
    except kinds as error:
        shown = "" if given is None else f"found {{{', '.join(f'{name}: {value}' for name, value in given.items())}}}: "
        raise ConfigError([f"{key}: {shown}{error}"]) from error


def _find(name: str, known: dict[str, Callable[..., Any]], key: str) -> Callable[..., Any]:
    """Returns the constructor of that name. The configuration lists names that an older torch may lack."""
    if is_reference(name):
        return load_reference(name, key)
    if name not in known:
        raise ConfigError([f"{key}: found {name}, which torch {torch.__version__} does not have"])
    return known[name]


def _check_kind(made: object, kind: type, name: str, key: str) -> None:
    """Refuses a class or function of the user that makes something else than the contract asks for."""
    if not isinstance(made, kind):
        expected = f"{kind.__module__}.{kind.__qualname__}"
        raise ConfigError([f"{key}: found {name}, which makes a {type(made).__name__}, expected a {expected}"])

"""The optimizer, the objective and the loggers that a configuration names: distopt's, or the user's as `module:Name`.

Each function here takes what it names for a trial: an argument that it does not accept is reported before the first
step, with the key of the configuration.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import pyro.infer
import torch
from pyro.infer import ELBO
from rich.console import Console
from torch.amp import GradScaler

from distopt.config import ConfigError, RunConfig
from distopt.config.plugins import is_reference, load_reference
from distopt.infer.capture.modes import CaptureMode
from distopt.infer.device import DeviceELBO
from distopt.optim import DistributedOptimizer, PyroLRScheduler, PyroOptim, by_name
from distopt.optim.amp import AutocastELBO, ScaledELBO
from distopt.optim.arguments import Args
from distopt.optim.construction import construct
from distopt.optim.lr_scheduler import metric_name
from distopt.optim.pytorch_optimizers import OPTIMIZERS, SCHEDULERS
from distopt.train.loggers import JsonLinesLogger, Logger, ProgressLogger, TensorBoardLogger
from distopt.train.trackers import TRACKERS
from distopt.train.trainjob_status import trainjob_logger

StepSchedule: TypeAlias = Callable[[DistributedOptimizer, float | None], None]
"""Takes a step of the optimizer's learning-rate schedule, given the loss."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of `train.precision`."""


def make_optimizer(config: RunConfig, scaler: GradScaler | None = None) -> tuple[PyroOptim, StepSchedule]:
    """Returns the optimizer that the configuration names, and a function that steps its schedule.

    Args:
        config: The run.
        scaler: Of the loss, where that is scaled.

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
        options: Any = {"nonfinite": chosen.nonfinite, "scaler": scaler}
        optimizer = PyroOptim(constructor, optim_args, chosen.clip.args(), **options)
        trial = construct(constructor, [torch.zeros(1, 1)], args)
    for pattern, more in chosen.args_by_name.items():
        with refused(f"optim.args_by_name.{pattern}"):
            construct(constructor, [torch.zeros(1, 1)], {**args, **more})
    _check_kind(trial, torch.optim.Optimizer, chosen.name, "optim.name")
    if inspect.unwrap(type(trial).step) is inspect.unwrap(torch.optim.Optimizer.step):  # torch wraps each class's step
        raise ConfigError([f"optim.name: {chosen.name} has no step(closure=None), which takes the step"])
    if chosen.scheduler is None:
        return optimizer, lambda _optimizer, _loss: None

    make = _find(chosen.scheduler.name, SCHEDULERS, "optim.scheduler.name")
    with refused("optim.scheduler.args", given=chosen.scheduler.args):
        scheduler_args = {"optimizer": constructor, "optim_args": optim_args, **chosen.scheduler.args}
        optimizer = PyroLRScheduler(make, scheduler_args, chosen.clip.args(), **options)
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


def make_loss(config: RunConfig) -> ELBO:
    """Returns the objective that the configuration names.

    Raises:
        ConfigError: There is no such objective, or it does not accept its arguments.
    """
    name = config.train.loss
    make = load_reference(name, "train.loss") if is_reference(name) else getattr(pyro.infer, name)
    with refused("train.loss_args", given=config.train.loss_args):
        loss = make(num_particles=config.train.num_particles, **config.train.loss_args)
    _check_kind(loss, ELBO, name, "train.loss")
    return loss


def make_scaler(config: RunConfig, device: torch.device) -> GradScaler | None:
    """Returns what scales the loss of a run in fp16; None for other precisions.

    Raises:
        ConfigError: The device does not compute in the precision of the configuration.
    """
    precision = config.train.precision
    if precision == 32:
        return None
    dtype = DTYPES[precision]
    try:
        with torch.autocast(device.type, dtype), warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns about a type that it does not cast to, and computes in 32 bits
            one = torch.ones(1, 1, device=device)
            is_cast = torch.mm(one, one).dtype == dtype
    except (RuntimeError, UserWarning):
        is_cast = False
    if not is_cast:
        raise ConfigError([f"train.precision: found {precision}, but torch {torch.__version__} has no {dtype} autocast "
                           f"on {device.type}; use 32 or another device"])  # fmt: skip
    return GradScaler(device.type) if precision == "fp16" else None


def in_precision(loss: ELBO, config: RunConfig, device: torch.device, scaler: GradScaler | None) -> ELBO:
    """Returns an objective that computes in the precision of the configuration, on its device where it names one."""
    if config.train.device is not None:
        loss = DeviceELBO(loss, device)
    if config.train.precision == 32:
        return loss
    cast = AutocastELBO(loss, device.type, DTYPES[config.train.precision])
    return cast if scaler is None else ScaledELBO(cast, scaler)


def capture_mode(config: RunConfig, device: torch.device) -> CaptureMode:
    """Returns how steps are to be captured; `auto` is `off` where they cannot be, so that no run has to say so."""
    train = config.train
    possible = device.type in ("cpu", "cuda") and train.precision == 32 and not train.loss.startswith("Jit")
    return train.capture if possible or train.capture != "auto" else "off"


def make_loggers(config: RunConfig, console: Console) -> list[Logger]:
    """Returns the loggers of rank 0: those of every run, then those that the configuration names.

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
        make = TRACKERS.get(entry.name) or load_reference(entry.name, f"log.loggers.{index}")
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

"""What would be captured of the steps of a run, for `distopt doctor CONFIG --capture`."""

from __future__ import annotations

from contextlib import nullcontext

import pyro
import torch
from torch import nn

from distopt.config import ConfigError, RunConfig
from distopt.data import GlobalBatches
from distopt.infer import explain_capture
from distopt.infer.capture import CaptureReport
from distopt.infer.device import DeviceELBO
from distopt.infer.sharded_plate import share_plates
from distopt.rng import seed_all
from distopt.train.components import make_loss
from distopt.train.task import TaskRows, load_task


def explain_run(config: RunConfig) -> CaptureReport:
    """Returns what capturing would give for the first batch of the first worker; nothing is trained or written.

    With `train.device: cuda` that is a step on the GPU, if there is one, else on the CPU.

    Args:
        config: A run of a task; as in the run, its code is imported, and its data are read.

    Raises:
        ConfigError: The configuration runs a script, or names something that is not there.
        TaskError: The task cannot be built.
    """
    if config.task is None:
        raise ConfigError(
            [
                "script: a script's steps can be explained from within it alone: "
                "print(distopt.infer.explain_capture(model, guide, *batch))"
            ]
        )
    wanted = config.train.device
    device = torch.device(wanted) if wanted and (wanted == "cpu" or torch.cuda.is_available()) else None
    with device or nullcontext():
        task = load_task(config.task, config.task_args)
    for module in (task.model, task.guide):
        if device is not None and isinstance(module, nn.Module):
            module.to(device)
    pyro.clear_param_store()
    seed_all(config.seed)

    batches = GlobalBatches(task.rows(), config.data.global_batch, config.seed, 0, config.launch.workers or 1)
    model, guide = share_plates(task.model, task.guide, batches.weight)
    batch = TaskRows(task, device).read(batches.rows(0))
    loss = make_loss(config) if device is None else DeviceELBO(make_loss(config), device)
    return explain_capture(model, guide, *batch, loss=loss)

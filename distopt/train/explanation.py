"""What would be captured of the steps of a run, for `distopt doctor CONFIG --capture`."""

from __future__ import annotations

import pyro

from distopt.config import ConfigError, RunConfig
from distopt.data import GlobalBatches
from distopt.infer import explain_capture
from distopt.infer.capture import CaptureReport
from distopt.infer.sharded_plate import share_plates
from distopt.rng import seed_all
from distopt.train.components import make_loss
from distopt.train.task import TaskRows, load_task


def explain_run(config: RunConfig) -> CaptureReport:
    """Returns what capturing would give for the first batch of the first worker; nothing is trained or written.

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
    task = load_task(config.task, config.task_args)
    pyro.clear_param_store()
    seed_all(config.seed)

    batches = GlobalBatches(task.rows(), config.data.global_batch, config.seed, 0, config.launch.workers or 1)
    model, guide = share_plates(task.model, task.guide, batches.weight)
    batch = TaskRows(task).read(batches.rows(0))
    return explain_capture(model, guide, *batch, loss=make_loss(config))

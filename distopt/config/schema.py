"""`RunConfig`: every key of the YAML but those of `launch`, with its unit."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distopt.config.base import Positive, Section
from distopt.config.launch import LaunchConfig
from distopt.config.plugins import Reference, trusted_packages
from distopt.config.reduce import ReduceConfig
from distopt.launchers import TRUSTED_VARIABLE

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

MAY_CHANGE = ("name", "run_dir", "launch", "log", "serve", "reduce", "checkpoint", "data.prefetch", "train.num_steps")
"""Keys that may differ when a run goes on from its checkpoints: where and how long it runs, not what it computes."""


class TrainConfig(Section):
    """The training loop."""

    num_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps of the optimizer, counted from the start of the run and not from its last resume."""
    noise: Literal["independent", "shared"] = "independent"
    """Whether each rank draws its own noise (a better gradient) or all draw the same (equal to one worker's run)."""
    num_particles: Annotated[int, Field(ge=1)] = 1
    """Samples of the guide that each rank averages in a step."""
    loss: Literal[
        "Trace_ELBO",
        "TraceGraph_ELBO",
        "TraceMeanField_ELBO",
        "TraceEnum_ELBO",
        "TraceTMC_ELBO",
        "JitTrace_ELBO",
        "JitTraceGraph_ELBO",
        "JitTraceMeanField_ELBO",
        "JitTraceEnum_ELBO",
        "TraceTailAdaptive_ELBO",
        "RenyiELBO",
    ] = "Trace_ELBO"
    """The objective's name in `pyro.infer`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the objective, such as `max_plate_nesting`."""


class DataConfig(Section):
    """Which rows a step reads."""

    global_batch: Annotated[int, Field(ge=1)] | None = None
    """Rows of a step over all workers together, a multiple of their number (of an elastic run: one for each at least);
    null takes all rows in every step."""
    prefetch: Annotated[int, Field(ge=0)] = 0
    """Batches that a thread of each worker reads while a step runs, for tasks that read from disk; their `batch` must
    draw no noise. 0 reads each batch when it is needed."""


class SchedulerConfig(Section):
    """A learning-rate schedule."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
    """The scheduler's name in `distopt.optim`, such as `ExponentialLR`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""
    every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps of the optimizer between two steps of the schedule."""


class ClipConfig(Section):
    """Limits on the gradient after it has been averaged over the ranks; null is no limit."""

    clip_norm: Positive | None = None
    """Largest 2-norm of each parameter's gradient."""
    clip_value: Positive | None = None
    """Largest magnitude of each element of a gradient."""
    global_norm: Positive | None = None
    """Largest 2-norm of all gradients together."""

    def args(self) -> dict[str, float]:
        """Returns the limits that are set, as `clip_args` of an optimizer."""
        return {key: value for key, value in self if value is not None}


class OptimConfig(Section):
    """The optimizer."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] = "ClippedAdam"
    """Its name in `distopt.optim`: one of torch's optimizers or of Pyro's."""
    args: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.01})
    """Its keyword arguments, `lr` first."""
    clip: ClipConfig = Field(default_factory=ClipConfig)
    """Limits on the averaged gradient."""
    nonfinite: Literal["step", "skip", "raise"] = "step"
    """A gradient that is NaN or infinite somewhere is stepped by, left out on all workers and counted, or an error."""
    scheduler: SchedulerConfig | None = None
    """The learning-rate schedule; null keeps the rate."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: Annotated[int, Field(ge=1)] | None = 500
    """Steps between two checkpoints; null saves only at the end and on a signal."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Checkpoints that are kept, the newest ones; two at least, so that one may be damaged."""
    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Keeps, besides, every checkpoint whose step is a multiple of this."""
    resume: Annotated[int, Field(ge=0)] | str = "auto"
    """`auto` goes on from the run's newest good checkpoint, `never` starts anew, a step or a path names one."""


class LogConfig(Section):
    """What is written on the way."""

    every_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between two rows of `metrics.jsonl`."""
    tensorboard: bool = True
    """Whether TensorBoard events are written to the run directory too."""


class ServeConfig(Section):
    """Health and metrics over HTTP while the run goes on: `/healthz`, `/readyz`, `/livez`, `/metrics`."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of a host's first rank, the next ranks on that host take the next ports; null serves nothing."""
    host: str = "127.0.0.1"
    """IP address to listen on. Whoever reaches it can read, so leave loopback only where the network is trusted."""
    stall_s: Positive = 600.0
    """Seconds without a finished step after which `/livez` fails; above `reduce.timeout_s` and any step's duration."""

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, host: str) -> str:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"{host!r} is no IP address; 127.0.0.1 is this machine alone, 0.0.0.0 everyone") from None
        return host


class RunConfig(Section):
    """A run: what is trained, on what, how, and where it is started."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The run's name: a letter or digit, then at most 63 letters, digits, `.`, `_`, `-`."""
    run_dir: Annotated[Path, Field(strict=False)]
    """Folder for everything the run writes, relative to where the command is given; by default `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of noise, initial values and the order of data."""
    task: Reference | None = None
    """`module:Name` of the task to train. Like every `module:Name` it is imported, so it is code: use only
    configurations that you trust. With `DISTOPT_TRUSTED_TASKS=mytasks,distopt.examples` in the environment, a
    configuration that names code outside these packages is refused."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""
    script: Annotated[str, Field(min_length=1)] | None = None
    """Path of your own training script, in place of `task`, relative to where the command is given."""
    script_args: list[str] = Field(default_factory=list)
    """Arguments of the script."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training loop."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Which rows a step reads."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    reduce: ReduceConfig = Field(default_factory=ReduceConfig)
    """How gradients of many workers become one."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = Field(default_factory=LogConfig)
    """What is written on the way."""
    serve: ServeConfig = Field(default_factory=ServeConfig)
    """Health and metrics over HTTP."""
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    """Where and how the run is started."""

    @model_validator(mode="before")
    @classmethod
    def _default_run_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("name"), str) and data.get("run_dir") is None:
            return {**data, "run_dir": f"runs/{data['name']}"}
        return data

    @field_validator("name")
    @classmethod
    def _name_stays_in_its_folder(cls, name: str) -> str:
        if ".." in name:
            raise ValueError("'..' is not allowed in a run's name")
        return name

    @field_validator("run_dir")
    @classmethod
    def _printable(cls, path: Path) -> Path:
        if re.search(r"[\x00-\x1f\x7f]", str(path)):
            raise ValueError("control characters are not allowed in a path")
        return path

    @model_validator(mode="after")
    def _one_thing_to_run(self) -> RunConfig:
        if (self.task is None) == (self.script is None):
            found = "neither" if self.task is None else "both"
            raise ValueError(f"found {found} of task and script, expected exactly one of them")
        if self.script is None and self.script_args:
            raise ValueError("script_args are given, but no script; arguments of a task go to task_args")
        if self.task is None and self.task_args:
            raise ValueError("task_args are given, but no task; arguments of a script go to script_args")
        return self

    @model_validator(mode="after")
    def _no_gradient_is_lost(self) -> RunConfig:
        calls = self.reduce.backward_passes_per_step
        for key, steps in (
            ("train.num_steps", self.train.num_steps),
            ("checkpoint.every_steps", self.checkpoint.every_steps),
        ):
            if steps is not None and steps % calls:
                raise ValueError(
                    f"{key} is {steps}, expected a multiple of reduce.backward_passes_per_step ({calls}): a checkpoint "
                    "does not hold gradients that wait for the rest of their step"
                )
        return self

    @field_validator("script")
    @classmethod
    def _scripts_are_trusted(cls, script: str | None) -> str | None:
        """Refuses a script if the environment declares trusted packages: a path belongs to none of them."""
        if script is not None and (trusted := trusted_packages()):
            raise ValueError(f"found {script}, but your {TRUSTED_VARIABLE} allows only code of {', '.join(trusted)}")
        return script

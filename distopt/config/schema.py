"""`RunConfig`: every key of the YAML but those of `launch`, with its unit."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, field_validator, model_validator

from distopt.config.base import Positive, Section
from distopt.config.catalog import ElboName, LoggerName, OptimizerName, SchedulerName
from distopt.config.launch import LaunchConfig
from distopt.config.paths import LocalPath, PathOrUrl, RunFolder, is_url
from distopt.config.plugins import Reference, is_reference, trusted_packages
from distopt.config.reduce import ReduceConfig
from distopt.config.values import Text
from distopt.launchers import CHECKPOINTS, TRUSTED_VARIABLE

RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


# A name becomes a folder, a Slurm job and Kubernetes objects. The pattern allows dots, two of which would lead out of
# `runs/`.
def _stays_in_its_folder(name: str) -> str:
    if ".." in name:
        raise ValueError("'..' is not allowed in a run's name")
    return name


RunName: TypeAlias = Annotated[str, Field(pattern=RUN_NAME_PATTERN), AfterValidator(_stays_in_its_folder)]
"""The name of a run, or of a sweep, from which those of its runs are made."""


def is_run_name(name: str) -> bool:
    """Returns whether `name` may be that of a run."""
    return re.fullmatch(RUN_NAME_PATTERN, name) is not None and ".." not in name


# Kept true by a test, which looks for the type `Reference` in the JSON schema.
CODE_KEYS = (
    "task",
    "train.loss",
    "optim.name",
    "optim.scheduler.name",
    "reduce.backend",
    "reduce.compression",
    "log.loggers",
    "launch.platform",
)
"""Keys that may name code of the user as `module:Name`."""


class MetricConfig(Section):
    """A metric that the task's `validate` returns, and which values of it are better."""

    metric: Annotated[str, Field(min_length=1)]
    """Its name in what `validate` returns."""
    mode: Literal["min", "max"] = "min"
    """Whether lower or higher values are better."""


class EarlyStoppingConfig(MetricConfig):
    """When a run ends before its last step."""

    patience: Annotated[int, Field(ge=1)] = 5
    """Validations without a better value after which the run ends."""
    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """By how much a value must be better to count, in the metric's unit."""


class TrainConfig(Section):
    """The training loop."""

    num_steps: Annotated[int, Field(ge=0)] = 1000
    """Optimizer steps, counted from the start of the run and not from where it was last resumed."""
    noise: Literal["independent", "shared"] = "independent"
    """Whether ranks draw different samples, which lowers the variance of the gradient, or the same ones (`shared`),
    which gives the result of a run with one worker."""
    num_particles: Annotated[int, Field(ge=1)] = 1
    """Samples of the guide that each rank averages over in a step."""
    loss: ElboName | Reference = "Trace_ELBO"
    """The objective: the name of an ELBO of `pyro.infer`, or `module:Name` of a subclass of `pyro.infer.ELBO`."""
    loss_args: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the objective, such as `max_plate_nesting`; it also gets `num_particles`."""
    check_steps: Annotated[int, Field(ge=0)] | None = 100
    """Steps after each start in which Pyro checks the arguments of distributions, supports and shapes; from then on it
    checks every 100th. Null checks every step, which takes a fifth longer. Checks change no number."""
    precision: Literal[32, "bf16", "fp16"] = 32
    """Bits of the matrix products of model and guide: 32, or 16 by `torch.autocast` as `bf16`, or `fp16` with a scaled
    loss. Parameters, densities, gradients and the optimizer keep 32 bits."""
    device: Literal["cpu", "cuda"] | None = None
    """Where model, guide and rows are: `cuda` is the GPU of each rank, by its rank on its host. Null leaves it to the
    task."""
    capture: Literal["auto", "off", "graph", "compiled"] = "auto"
    """With `graph` a step is recorded, and later steps run the recording instead of the model's code: the same numbers
    in a fraction of the time. A model that cannot be recorded runs as it does with `off`, and the run says why. `auto`
    is `graph` for all steps but those that Pyro checks, see `check_steps`, and `off` with `precision` 16 bits.
    `compiled` runs the recording through torch's compiler, which needs a C++ compiler and some time before the first
    step: quicker still for many rows, and equal to eager steps but for rounding."""
    compile_from_step: Annotated[int, Field(ge=1)] | None = None
    """The step, counted from 1, from which `auto` compiles steps as `compiled` does: a long run waits for the compiler
    where that pays. No step is left to Pyro's checks from there on. Null never compiles."""

    validate_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two calls of the task's `validate`; null never calls it."""
    early_stopping: EarlyStoppingConfig | None = None
    """Ends the run when a metric no longer improves; null trains to the last step."""


class DataConfig(Section):
    """Which rows of the data a step reads."""

    global_batch: Annotated[int, Field(ge=1)] | None = None
    """Rows per step over all workers together, a multiple of the number of workers (in an elastic run only at least
    one row for each); null takes all rows in every step."""
    shard_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of its datapoints that each worker of a sharded task reads in a step, at least one, in an order of its
    own; null takes all. The model passes them to its plate as `subsample`."""
    prefetch: Annotated[int, Field(ge=0)] = 0
    """Batches that a thread of each worker reads ahead while a step runs, for tasks that read from disk; the task's
    `batch` must then not draw random numbers. 0 reads each batch when it is needed."""


class SchedulerConfig(Section):
    """A learning-rate schedule."""

    name: SchedulerName | Reference
    """The scheduler: a name of `torch.optim.lr_scheduler`, such as `ExponentialLR`, or `module:Name` of your own class
    or function that is called with a torch optimizer and `args`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""
    every_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps between two steps of the schedule."""


class ClipConfig(Section):
    """Limits on the gradient after it has been averaged over the ranks; null sets no limit."""

    clip_norm: Positive | None = None
    """Largest 2-norm of each parameter's gradient."""
    clip_value: Positive | None = None
    """Largest magnitude of each element of a gradient."""
    global_norm: Positive | None = None
    """Largest 2-norm of all gradients together."""

    def args(self) -> dict[str, float]:
        """Returns the limits that are set, as the `clip_args` of an optimizer."""
        return {key: value for key, value in self if value is not None}


class OptimConfig(Section):
    """The optimizer."""

    name: OptimizerName | Reference = "ClippedAdam"
    """The optimizer: a name of `torch.optim` or `pyro.optim`, or `module:Name` of your own `torch.optim.Optimizer`
    class or of a function that returns one; it is called with a list of parameters and `args`."""
    args: dict[str, Any] = Field(default_factory=lambda: {"lr": 0.01})
    """Its keyword arguments, such as `lr`."""
    args_by_name: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further arguments by shell pattern of a parameter's name, such as `{"*.bias": {weight_decay: 0}}`; names are
    those of `nn.Module.named_parameters`, as in `AutoNormal.scales.z`. All that match apply, the later ones last."""
    clip: ClipConfig = Field(default_factory=ClipConfig)
    """Limits on the averaged gradient."""
    nonfinite: Literal["step", "skip", "raise"] = "skip"
    """What to do with NaN or infinite gradients: `skip` the step on all workers and count it, `raise` an error, or
    `step` anyway. A state that is not finite is never saved."""
    max_skipped_in_row: Annotated[int, Field(ge=1)] = 100
    """Steps skipped in a row after which the run ends with an error: the model no longer has a finite gradient."""
    scheduler: SchedulerConfig | None = None
    """The learning-rate schedule; null keeps the learning rate constant."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    directory: PathOrUrl | None = None
    """Folder of the checkpoints, or a URL such as `s3://bucket/run` (fsspec); null is `checkpoints` in `run_dir`. Only
    one run may use it."""
    every_steps: Annotated[int, Field(ge=1)] | None = 500
    """Steps between two checkpoints; null saves only at the end and when the run is stopped by a signal."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Number of newest checkpoints to keep; at least two, so that one of them may be damaged."""
    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Also keeps every checkpoint whose step is a multiple of this number; null keeps no others."""
    keep_best: MetricConfig | None = None
    """Saves a checkpoint whenever a validated metric is better than before, and keeps the best one; null does not."""
    resume: Annotated[int, Field(ge=0)] | PathOrUrl = "auto"
    """`auto` resumes from the newest good checkpoint of the run, `never` starts from the beginning; a step, or the path
    of one of its checkpoints, selects one. With the path of another run, or of one of its checkpoints, the run starts
    at step 0 from the parameters there (fine-tuning); once it has checkpoints, it resumes from these."""
    resume_only: Annotated[list[Literal["params", "optimizer"]], Field(min_length=1)] | None = None
    """What to take from a checkpoint of another configuration or another run: `[params]` starts with a new optimizer.
    Null takes all, of another run its parameters and optimizer."""


class LoggerConfig(Section):
    """A further logger."""

    name: LoggerName | Reference
    """`mlflow`, `wandb` or `trackio`, each an extra; or `module:Name` of a subclass of `distopt.train.Logger`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments: `experiment` and `tracking_uri` of `mlflow`, `project` and what `init` takes of `wandb`
    (such as `mode: offline`) and `trackio`."""


class LogConfig(Section):
    """What is written during the run."""

    every_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between two rows of `metrics.jsonl`, and between two calls of every other logger."""
    tensorboard: bool = True
    """Whether to write TensorBoard events to the run directory too."""
    loggers: list[LoggerConfig] = Field(default_factory=list)
    """Further loggers, each by its name (`mlflow`, `wandb`, `trackio`, or `module:Name` of your own), or as a mapping
    of `name` and `args`."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _names_stand_for_sections(cls, loggers: Any) -> Any:
        """Takes `wandb` for `{name: wandb}`."""
        if not isinstance(loggers, list):
            return loggers
        return [{"name": each} if isinstance(each, str) else each for each in loggers]


class ServeConfig(Section):
    """Health and metrics over HTTP while the run is in progress: `/healthz`, `/readyz`, `/livez`, `/metrics`."""

    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of the first rank on a host; further ranks of that host use the following ports. Null serves nothing."""
    host: str = "127.0.0.1"
    """IP address to listen on. Anyone who can reach it can read, so use another address only in a trusted network."""
    stall_s: Positive = 600.0
    """Seconds without a finished step after which `/livez` fails; choose more than `reduce.timeout_s` and than the
    duration of a step."""

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, host: str) -> str:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(
                f"{host!r} is not an IP address; 127.0.0.1 admits only this machine, 0.0.0.0 all"
            ) from None
        return host


class RunConfig(Section):
    """A run: what is trained, with which data, how, and where it is started."""

    name: RunName
    """The run's name: a letter or digit, then at most 63 letters, digits, `.`, `_`, `-`."""
    run_dir: RunFolder
    """Folder for everything that the run writes, relative to the current directory; by default `runs/<name>`. It is no
    URL: only checkpoints may go to one, by `checkpoint.directory`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    """Seed of the samples, the initial values and the order of the data."""
    task: Reference | None = None
    """`module:Name` of the task to train. Like every `module:Name` it is imported, so it is code: use only
    configurations that you trust. With `DISTOPT_TRUSTED_TASKS=mytasks,distopt.examples` in the environment, a
    configuration that names code outside these packages is refused."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""
    script: LocalPath | None = None
    """Path of your own training script, instead of `task`; relative to the current directory."""
    script_args: list[Text] = Field(default_factory=list)
    """Arguments of the script."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training loop."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Which rows of the data a step reads."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer."""
    reduce: ReduceConfig = Field(default_factory=ReduceConfig)
    """How gradients of many workers become one."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    log: LogConfig = Field(default_factory=LogConfig)
    """What is written during the run."""
    serve: ServeConfig = Field(default_factory=ServeConfig)
    """Health and metrics over HTTP."""
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    """Where and how the run is started."""

    # A validator and not a default, because pydantic's defaults cannot see other fields.
    @model_validator(mode="before")
    @classmethod
    def _default_run_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("run_dir") is None:
            return {**data, "run_dir": f"runs/{data.get('name')}"}  # a name that is missing or none is an error itself
        return data

    @model_validator(mode="after")
    def _one_thing_to_run(self) -> RunConfig:
        if (self.task is None) == (self.script is None):
            given = "neither" if self.task is None else "both"
            raise ValueError(f"found {given} of task and script, expected exactly one of them")
        if self.script is None and self.script_args:
            raise ValueError("found script_args without script; the arguments of a task are task_args")
        if self.task is None and self.task_args:
            raise ValueError("found task_args without task; the arguments of a script are script_args")
        return self

    @model_validator(mode="after")
    def _no_gradient_is_lost(self) -> RunConfig:
        calls = self.reduce.backward_passes_per_step
        for key, steps in (
            ("train.num_steps", self.train.num_steps),
            ("checkpoint.every_steps", self.checkpoint.every_steps),
            ("train.validate_every_steps", self.train.validate_every_steps),
        ):
            if steps is not None and steps % calls:
                raise ValueError(
                    f"{key} is {steps}, expected a multiple of reduce.backward_passes_per_step ({calls}): a checkpoint "
                    "does not hold gradients that wait for the rest of their step"
                )
        return self

    @model_validator(mode="after")
    def _metrics_are_measured(self) -> RunConfig:
        rules = {"train.early_stopping": self.train.early_stopping, "checkpoint.keep_best": self.checkpoint.keep_best}
        for key, rule in rules.items():
            if rule is not None and self.train.validate_every_steps is None:
                raise ValueError(f"found {key} without train.validate_every_steps, which says how often to measure")
        return self

    @model_validator(mode="after")
    def _compiling_is_possible(self) -> RunConfig:
        train = self.train
        if train.compile_from_step is None:
            return self
        if train.capture != "auto":
            raise ValueError(
                f"found train.compile_from_step {train.compile_from_step} and train.capture {train.capture}, expected "
                "auto, which alone begins to compile at a later step"
            )
        if train.precision != 32 or train.loss.startswith("Jit"):
            key, value = ("precision", train.precision) if train.precision != 32 else ("loss", train.loss)
            raise ValueError(
                f"found train.compile_from_step {train.compile_from_step} and train.{key} {value}, whose steps are not "
                "captured, expected only one"
            )
        return self

    @model_validator(mode="after")
    def _precision_is_possible(self) -> RunConfig:
        precision, train = self.train.precision, self.train
        if precision == 32:
            return self
        if train.capture in ("graph", "compiled"):
            raise ValueError(f"found train.precision {precision} and train.capture {train.capture}, expected only one")
        if train.loss.startswith("Jit"):
            raise ValueError(f"found train.precision {precision} with train.loss {train.loss}: torch.jit casts nothing")
        if precision == "fp16" and self.optim.nonfinite != "skip":
            raise ValueError(
                f"found train.precision fp16 with optim.nonfinite {self.optim.nonfinite}, expected skip: the scale of "
                "the loss is found by steps whose gradient is infinite, which are left out"
            )
        return self

    @field_validator("script")
    @classmethod
    def _scripts_are_trusted(cls, script: str | None) -> str | None:
        """Refuses a script if the environment declares trusted packages: a path belongs to none of them."""
        if script is not None and (trusted := trusted_packages()):
            raise ValueError(f"found {script}, but your {TRUSTED_VARIABLE} allows only code of {', '.join(trusted)}")
        return script

    def checkpoints(self) -> Path | str:
        """Returns where the run keeps its checkpoints: a folder, or a URL."""
        chosen = self.checkpoint.directory
        if chosen is None:
            return self.run_dir / CHECKPOINTS
        return chosen if is_url(chosen) else Path(chosen)

    def references(self) -> list[tuple[str, str]]:
        """Returns (key, `module:Name`) of all code of the user that the configuration names."""
        return [(key, name) for key in CODE_KEYS for name in _names_at(self, key.split(".")) if is_reference(name)]


def _names_at(value: Any, keys: Sequence[str]) -> Iterator[str]:
    """Yields the names below `keys`: none where a section is null, several where it is a list of sections."""
    if isinstance(value, list):
        for each in value:
            yield each.name
    elif isinstance(value, Section):
        yield from _names_at(getattr(value, keys[0]), keys[1:])
    elif value is not None:
        yield value

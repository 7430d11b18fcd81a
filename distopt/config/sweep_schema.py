"""The YAML of a sweep: one run's YAML, the keys that its trials change, and how many run at once."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from distopt.config.base import ConfigError, Section
from distopt.config.load import load_config
from distopt.config.schema import RunName
from distopt.config.yaml_source import MAX_BYTES, UnsafeYAML, parse_yaml

Scalar = str | bool | int | float | None


class RangeConfig(Section):
    """The values that Optuna may choose for a key: a range of numbers, or choices."""

    low: int | float | None = None
    """Smallest value; where it, `high` and `step` are whole numbers, so are all values."""
    high: int | float | None = None
    """Largest value."""
    log: bool = False
    """Whether the logarithm is drawn evenly."""
    step: int | float | None = None
    """Distance between two values; null takes every number, or every whole number."""
    choices: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """The values, in place of a range."""

    @model_validator(mode="after")
    def _one_kind(self) -> RangeConfig:
        numbers = [value for value in (self.low, self.high, self.step) if value is not None]
        if self.choices is not None:
            if numbers or self.log:
                raise ValueError("expected either low and high, or choices")
            return self
        if self.low is None or self.high is None:
            raise ValueError("expected either low and high, or choices")

        # What Optuna refuses only when it is asked for a trial.
        if not self.low <= self.high:
            raise ValueError(f"found low {self.low} and high {self.high}, expected low to be the smaller one")
        if self.step is not None and (self.log or not self.step > 0):
            raise ValueError(f"found step {self.step}, expected a distance above 0, and none together with log")
        if self.log and not self.low > 0:
            raise ValueError(f"found low {self.low} with log, expected a value above 0")
        return self

    @property
    def is_integer(self) -> bool:
        """Whether the values are whole numbers."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step) if value is not None)


class OptunaConfig(Section):
    """A search by Optuna, which is an extra."""

    num_trials: Annotated[int, Field(ge=1)]
    """Trials in all; may be raised later, and the sweep continues."""
    space: Annotated[dict[str, RangeConfig], Field(min_length=1)]
    """Ranges by dotted key of the run, such as `optim.args.lr: {low: 1.0e-3, high: 1, log: true}`."""
    sampler: str = "TPESampler"
    """A class of `optuna.samplers`."""
    sampler_args: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments, such as `seed`."""
    pruner: str | None = None
    """A class of `optuna.pruners`, such as `MedianPruner`; null lets every trial train to its end."""
    pruner_args: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments."""


class SweepConfig(Section):
    """Several runs of one YAML, compared by a metric."""

    name: Annotated[RunName, Field(max_length=56)]
    """The sweep's name. It is recorded in `runs/<name>`, and its trials are the runs `<name>-000`, `<name>-001`, ..."""
    run: str
    """The YAML of the run, relative to the current directory."""
    overrides: list[str] = Field(default_factory=list)
    """`key=value` for all trials."""
    metric: str = "elbo"
    """What trials are compared by: a name in `metrics.jsonl`, such as `validation/mse`; its last value counts."""
    mode: Literal["min", "max"] = "max"
    """Whether lower or higher values are better."""
    parallel: Annotated[int, Field(ge=1)] = 1
    """Trials that run at once."""
    grid: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)] | None = None
    """Values by dotted key of the run, such as `seed: [1, 2, 3]`; every combination is a trial."""
    optuna: OptunaConfig | None = None
    """A search by Optuna, in place of a grid."""

    @model_validator(mode="after")
    def _one_search(self) -> SweepConfig:
        if (self.grid is None) == (self.optuna is None):
            raise ValueError("expected either grid or optuna")
        return self

    def combinations(self) -> list[dict[str, Any]]:
        """Returns the keys and values of each trial of a grid, the last key varying fastest; a search has none."""
        if self.grid is None:
            return []
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def load_sweep(path: str | Path) -> SweepConfig:
    """Reads the YAML of a sweep, and checks the run with the values of its grid.

    Raises:
        ConfigError: There are mistakes, in it or in the run that it names.
    """
    try:
        with Path(path).open("rb") as file:
            raw = parse_yaml(file.read(MAX_BYTES + 1).decode("utf-8"), lambda keys: False)
        config = SweepConfig.model_validate(raw)
    except (OSError, UnicodeDecodeError, UnsafeYAML, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: {error}"]) from error
    except ValidationError as error:
        problems = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors(include_url=False)]
        raise ConfigError([f"{path}: {f'{key}: ' if key else ''}{text}" for key, text in problems]) from error

    for values in config.combinations() or [first_values(config)]:
        load_config(config.run, [*config.overrides, *as_overrides(values)])
    return config


def first_values(config: SweepConfig) -> dict[str, Any]:
    """Returns one value of each range, to check the keys of a search before it starts."""
    space = config.optuna.space if config.optuna is not None else {}
    return {key: each.choices[0] if each.choices else each.low for key, each in space.items()}


def as_overrides(values: dict[str, Any]) -> list[str]:
    """Returns values as `key=value` for the command line.

    Example:
        >>> as_overrides({"optim.args.lr": 0.1, "launch.hosts": ["a", "b"]})
        ['optim.args.lr=0.1', 'launch.hosts=[a, b]']
    """
    return [f"{key}={_as_yaml(value)}" for key, value in values.items()]


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")

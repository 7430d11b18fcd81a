"""Validation while a run trains: metrics over all ranks, when to stop early, and which checkpoint is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from distopt.backends import Backend
from distopt.config import MetricConfig, RunConfig
from distopt.rng import seed_all
from distopt.train.task import TaskError

PREFIX = "validation/"
"""What the names of validated metrics begin with where loggers get them."""


@dataclass(frozen=True)
class Mean:
    """A rank's part of a mean over all ranks, which is the sum of the totals over the sum of the counts.

    Args:
        total: Sum over this rank's rows.
        count: Number of its rows; 0 on a rank without any.

    Example:
        >>> import torch
        >>> errors = torch.tensor([0.5, -0.5])
        >>> Mean(float(errors.square().sum()), len(errors))
        Mean(total=0.5, count=2)
    """

    total: float
    count: float


@dataclass(frozen=True)
class Total:
    """A rank's part of a sum over all ranks.

    Args:
        value: The sum over this rank's rows.
    """

    value: float


Measured: TypeAlias = float | Mean | Total
"""A rank's part of a metric: of a mean over rows, of a sum, or (a number) of a mean in which all ranks count alike."""


@dataclass
class _Best:
    """The best value of a metric so far."""

    value: float = math.nan
    step: int = 0
    num_worse: int = 0  # validations since

    def update(self, step: int, value: float, config: MetricConfig, min_delta: float = 0.0) -> bool:
        """Notes a value; returns whether it is better than all before, which NaN never is."""
        gain = self.value - value if config.mode == "min" else value - self.value
        is_better = math.isfinite(value) and (math.isnan(self.value) or gain > min_delta)
        if is_better:
            self.value = value
            self.step = step
        self.num_worse = 0 if is_better else self.num_worse + 1
        return is_better


class Validation:
    """Measures metrics on data that a run does not train on every so many steps, and decides by them.

    All ranks compute the decisions from the same gathered numbers, so they agree; what they depend on is saved with the
    checkpoints, so that a resumed run decides as an undisturbed one.

    Args:
        config: The run.
        validate: Returns this rank's part of each metric, as `Task.validate` does.
        backend: Link to the other ranks.

    Attributes:
        values: The metrics that were measured last.
    """

    def __init__(self, config: RunConfig, validate: Callable[[], Mapping[str, Measured]], backend: Backend) -> None:
        self._config = config
        self._validate = validate
        self._backend = backend
        self._stopping = _Best()
        self._keeping = _Best()
        self.values: dict[str, float] = {}

    def is_due(self, step: int) -> bool:
        """Returns whether step number `step` is followed by a validation."""
        every_steps = self._config.train.validate_every_steps
        return every_steps is not None and step % every_steps == 0

    def run(self, step: int) -> bool:
        """Measures after a step; returns whether a checkpoint of it has to be saved, since it is the best so far.

        Raises:
            TaskError: `validate` failed on a rank, or ranks measured different metrics, or not the one that the
                configuration names; the same error on all ranks.

        Cost:
            One `all_gather_json`; all ranks call it.
        """
        train = self._config.train
        # Random numbers of its own: training draws the same ones with validation and without.
        seed_all(self._config.seed, step, self._backend.rank, train.noise)
        self.values = _combined(self._backend.all_gather_json(self._measure()))

        stopping, keeping = train.early_stopping, self._config.checkpoint.keep_best
        if stopping is not None:
            value = self._value(stopping, "train.early_stopping")
            self._stopping.update(step, value, stopping, stopping.min_delta)
        if keeping is None:
            return False
        return self._keeping.update(step, self._value(keeping, "checkpoint.keep_best"), keeping)

    def _measure(self) -> dict[str, Any]:
        """Returns this rank's part as JSON, or its error: raised here alone, the others would wait for this rank."""
        try:
            with torch.no_grad():
                measured = self._validate()
            return {"metrics": {name: _as_json(value) for name, value in measured.items()}}
        except Exception as error:
            return {"error": f"validate() raised {type(error).__name__}: {error}"}

    def _value(self, wanted: MetricConfig, key: str) -> float:
        if wanted.metric not in self.values:
            code = self._config.task or self._config.script
            raise TaskError(
                f"{key}.metric: found {wanted.metric}, but validate() of {code} returns "
                f"{', '.join(self.values) or 'no metric'}"
            )
        return self.values[wanted.metric]

    @property
    def early_stop(self) -> str | None:
        """Why the run stops early; None while it does not."""
        config = self._config.train.early_stopping
        if config is None or self._stopping.num_worse < config.patience:
            return None
        best = f"{self._stopping.value:g} at step {self._stopping.step:,}" if self._stopping.step else "never finite"
        return f"{config.metric} has not improved in {self._stopping.num_worse} validations ({best})"

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint is the best one; None without `checkpoint.keep_best`, or before the first."""
        return self._keeping.step or None if self._config.checkpoint.keep_best is not None else None

    def state(self) -> dict[str, Any]:
        """Returns what decisions depend on, as JSON, with the metrics by which they were made."""
        config = self._config
        rules: dict[str, tuple[MetricConfig | None, _Best]] = {}
        rules["early_stopping"] = (config.train.early_stopping, self._stopping)
        rules["keep_best"] = (config.checkpoint.keep_best, self._keeping)
        return {
            name: {"metric": rule.metric, "mode": rule.mode, **vars(best)}
            for name, (rule, best) in rules.items()
            if rule is not None
        }

    def load_state(self, saved: Any) -> None:
        """Continues from what `state` returned; a rule that is by another metric now starts anew."""
        saved = saved if isinstance(saved, Mapping) else {}
        rules = {"early_stopping": self._config.train.early_stopping, "keep_best": self._config.checkpoint.keep_best}
        for name, best in (("early_stopping", self._stopping), ("keep_best", self._keeping)):
            rule, fields = rules[name], dict(saved.get(name) or {})
            if rule is not None and (fields.pop("metric", None), fields.pop("mode", None)) == (rule.metric, rule.mode):
                for key, value in fields.items():
                    setattr(best, key, value)


def _as_json(value: Measured) -> list[Any]:
    """Returns a rank's part of a metric; numbers as text, since JSON has no NaN."""
    if isinstance(value, Mean):
        return ["mean", repr(float(value.total)), repr(float(value.count))]
    if isinstance(value, Total):
        return ["total", repr(float(value.value))]
    return ["mean", repr(float(value)), "1.0"]


def _combined(gathered: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the metrics over all ranks.

    Raises:
        TaskError: A rank failed, or has other metrics than rank 0.
    """
    first = gathered[0].get("metrics", {})
    for rank, each in enumerate(gathered):
        if "error" in each:
            raise TaskError(f"rank {rank} of {len(gathered)}: {each['error']}")
        kinds = [{name: value[0] for name, value in metrics.items()} for metrics in (first, each["metrics"])]
        if kinds[0] != kinds[1]:
            raise TaskError(
                f"validate() returns {', '.join(first) or 'nothing'} on rank 0 and "
                f"{', '.join(each['metrics']) or 'nothing'} on rank {rank}; all ranks must return the same metrics, a "
                "rank without rows Mean(0.0, 0)"
            )

    combined: dict[str, float] = {}
    for name, (kind, *_) in first.items():
        columns = zip(*(each["metrics"][name][1:] for each in gathered), strict=True)
        sums = [math.fsum(map(float, column)) for column in columns]
        combined[name] = sums[0] if kind == "total" else sums[0] / sums[1] if sums[1] else math.nan
    return combined

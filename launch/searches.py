"""Which values the next trial of a sweep has: all combinations of a grid, or what Optuna suggests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from distopt.config import ConfigError
from distopt.config.sweep_schema import OptunaConfig, RangeConfig, SweepConfig


class Search(ABC):
    """Suggests trials; everything that it has to remember is on disk, so that a sweep can be killed at any time."""

    @abstractmethod
    def suggest(self, number: int) -> dict[str, Any] | None:
        """Returns the values of trial `number`, by dotted key; None when there are no more trials.

        Args:
            number: The trial, counted from 0; each is asked for once.
        """

    def report(self, number: int, step: int, value: float) -> bool:
        """Notes a value of the metric of a trial that is running; returns whether to end the trial."""
        return False

    def tell(self, number: int, state: str, value: float | None) -> None:  # noqa: B027  # optional
        """Notes how a trial ended: `done`, `pruned` or `failed`."""


class GridSearch(Search):
    """All combinations of a grid."""

    def __init__(self, config: SweepConfig) -> None:
        self._combinations = config.combinations()

    def suggest(self, number: int) -> dict[str, Any] | None:
        """Returns the next combination."""
        return self._combinations[number] if number < len(self._combinations) else None


FINITE = ("BruteForceSampler", "GridSampler")
"""Optuna's samplers that try each value of a finite space once."""


class OptunaSearch(Search):
    """What Optuna's samplers suggest and its pruners end; the study is a journal in the sweep's folder.

    Args:
        config: The sweep.
        folder: Of the sweep.
        known: Trials that the sweep has recorded. Others that the study has were suggested and never started.
    """

    def __init__(self, config: SweepConfig, folder: Path, known: int) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ConfigError(["optuna: needs the package optuna: pip install 'distopt[optuna]'"]) from error
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        assert config.optuna is not None
        self._optuna = optuna
        self._config = config.optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = _make(optuna.samplers, "sampler", self._config.sampler, self._config.sampler_args)
        pruner_name = self._config.pruner or "NopPruner"
        pruner = _make(optuna.pruners, "pruner", pruner_name, self._config.pruner_args)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "optuna.journal"))),
            study_name=config.name,
            direction="minimize" if config.mode == "min" else "maximize",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        # A sampler of a finite space says by `study.stop` that it is done; Optuna allows that in its own loop alone.
        # Asked again, as by a sweep that is continued, or while its last values are still tried, it repeats some.
        self._is_finite = self._config.sampler in FINITE
        self._is_exhausted = False
        self._study.stop = self._note_exhausted
        self._numbers: dict[int, int] = {}  # Optuna's number of each trial
        self._match(known)

    def _match(self, known: int) -> None:
        """Finds Optuna's number of each recorded trial, and gives up those that were never recorded."""
        for trial in self._study.get_trials(deepcopy=False):
            number = trial.user_attrs.get("number")
            if number is not None and number < known:
                self._numbers[number] = trial.number
            elif not trial.state.is_finished():
                self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)

    def suggest(self, number: int) -> dict[str, Any] | None:
        """Asks Optuna."""
        if number >= self._config.num_trials or self._is_exhausted:
            return None
        space = {key: _distribution(self._optuna, each) for key, each in self._config.space.items()}
        known = self._known_params()
        trial = self._study.ask(space)
        if self._is_finite and trial.params in known:
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            self._is_exhausted = True
            return None
        trial.set_user_attr("number", number)
        self._numbers[number] = trial.number
        return dict(trial.params)

    def _known_params(self) -> list[dict[str, Any]]:
        numbers = set(self._numbers.values())
        return [trial.params for trial in self._study.get_trials(deepcopy=False) if trial.number in numbers]

    def _note_exhausted(self) -> None:
        self._is_exhausted = True

    def report(self, number: int, step: int, value: float) -> bool:
        """Passes the value on, and returns what the pruner says."""
        frozen = self._study.get_trials(deepcopy=False)[self._numbers[number]]
        trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
        if step not in frozen.intermediate_values:
            trial.report(value, step)
        return bool(trial.should_prune())

    def tell(self, number: int, state: str, value: float | None) -> None:
        """Passes the end on; a trial without a value has failed for Optuna."""
        states = self._optuna.trial.TrialState
        kind = {"done": states.COMPLETE, "pruned": states.PRUNED}.get(state, states.FAIL)
        if kind == states.COMPLETE and value is None:
            kind = states.FAIL
        values = value if kind == states.COMPLETE else None
        self._study.tell(self._numbers[number], values, state=kind, skip_if_finished=True)


def make_search(config: SweepConfig, folder: Path, known: int) -> Search:
    """Returns the search that a sweep names.

    Args:
        config: The sweep.
        folder: Of the sweep.
        known: How many trials it has recorded.

    Raises:
        ConfigError: Optuna is not installed, or has no such class.
    """
    return GridSearch(config) if config.optuna is None else OptunaSearch(config, folder, known)


def _make(module: Any, key: str, name: str, args: dict[str, Any]) -> Any:
    """Makes a sampler or a pruner."""
    classes = [each for each in dir(module) if each.endswith(key.capitalize())]
    if name not in classes:
        raise ConfigError([f"optuna.{key}: found {name}; Optuna has {', '.join(classes)}"])
    try:
        return getattr(module, name)(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"optuna.{key}_args: {error}"]) from error


def _distribution(optuna: Any, config: RangeConfig) -> Any:
    if config.choices is not None:
        return optuna.distributions.CategoricalDistribution(config.choices)
    if config.is_integer:
        return optuna.distributions.IntDistribution(config.low, config.high, config.log, int(config.step or 1))
    return optuna.distributions.FloatDistribution(config.low, config.high, config.log, config.step)


__all__ = ["GridSearch", "OptunaConfig", "OptunaSearch", "Search", "make_search"]

"""What a run logs about its steps: means of what they measured, speed, and how long it has trained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from distopt.run_files import read_metrics


class Measurements:
    """Collects what is measured between two logged steps.

    Args:
        run_dir: Of the run; None on ranks that log nothing.
        first_step: Step that the run resumes from.
        rows_per_step: Rows of a step, over all ranks; None if they are not known.
    """

    def __init__(self, run_dir: Path | None, first_step: int, rows_per_step: int | None) -> None:
        self._rows_per_step = rows_per_step
        self._values: dict[str, list[float]] = {}
        self._num_steps = 0
        now_s = time.monotonic()
        self._since_s = now_s
        # The time of training goes on where the last process that logged has left it.
        logged = [row for row in read_metrics(run_dir) if row["step"] <= first_step] if run_dir is not None else []
        self._began_s = now_s - (logged[-1].get("train_s") or 0.0 if logged else 0.0)

    def add(self, values: Mapping[str, float]) -> None:
        """Adds what a step has measured, by name."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(float(value))

    def count_step(self) -> None:
        """Counts a step, for the speed."""
        self._num_steps += 1

    def close(self) -> dict[str, float]:
        """Returns the means over the steps since the last call, their speed, and the time of training."""
        now_s = time.monotonic()
        steps_per_s = self._num_steps / max(now_s - self._since_s, 1e-9)
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values = {}
        self._num_steps = 0
        self._since_s = now_s

        speed = {"steps_per_s": steps_per_s}
        if self._rows_per_step is not None:
            speed = {"rows_per_s": steps_per_s * self._rows_per_step}
        return {**means, **speed, "train_s": now_s - self._began_s}

"""What a run logs about its steps: loss, speed, learning rate, and how long it has trained."""

from __future__ import annotations

import math
import time
from pathlib import Path

from distopt.optim import PyroOptim, StepInfo
from distopt.run_files import read_metrics


class Measurements:
    """Collects what is measured between two logged steps.

    Args:
        run_dir: Of the run; None on ranks that log nothing.
        first_step: Step that the run resumes from.
        rows_per_step: Rows of a step, over all ranks.
    """

    def __init__(self, run_dir: Path | None, first_step: int, rows_per_step: int) -> None:
        self._rows_per_step = rows_per_step
        self._losses: list[float] = []
        now_s = time.monotonic()
        self._since_s = now_s
        # The time of training goes on where the last process that logged has left it.
        logged = [row for row in read_metrics(run_dir) if row["step"] <= first_step] if run_dir is not None else []
        self._began_s = now_s - (logged[-1].get("train_s") or 0.0 if logged else 0.0)

    def add(self, info: StepInfo) -> None:
        """Adds a step."""
        assert info.loss is not None
        self._losses.append(info.loss)

    def close(self, info: StepInfo, optimizer: PyroOptim, num_skipped: int) -> dict[str, float]:
        """Returns the values for the loggers, those of the steps since the last call and of the last one.

        Args:
            info: Of the last step.
            optimizer: Whose learning rate is logged.
            num_skipped: Steps that were skipped.
        """
        now_s = time.monotonic()
        num_steps = len(self._losses)
        loss = sum(self._losses) / num_steps
        steps_per_s = num_steps / max(now_s - self._since_s, 1e-9)
        self._losses = []
        self._since_s = now_s

        norm = info.gradient_norm
        rates = optimizer.learning_rates()
        return {
            "elbo": -loss,
            "rows_per_s": steps_per_s * self._rows_per_step,
            "gradient_norm": math.nan if norm is None else norm,
            "skipped_steps": num_skipped,
            "train_s": now_s - self._began_s,
            **({"lr": max(rates)} if rates else {}),
        }

"""Tasks for real runs that are killed: they tell which rows they read, so that their order can be compared."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.train.tasks import Line


def die(*args: Any, **settings: Any) -> None:
    """Stands in for whatever is called at the moment of death."""
    os.kill(os.getpid(), signal.SIGKILL)


class LoggedLine(Line):
    """The straight line, with a file of this life's batches.

    Args:
        folder: where each process appends to `batches-RANK-PID.jsonl`.
        settings: of `Line`.
    """

    def __init__(self, folder: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._path = Path(folder) / f"batches-{os.environ['RANK']}-{os.getpid()}.jsonl"

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        with self._path.open("a") as file:
            file.write(json.dumps(rows.tolist()) + "\n")
        return super().batch(rows)


class Dying(LoggedLine):
    """Each life of the run but the last ends in another phase of its work, on one rank and then on the other."""

    PHASES = ("init", "first collective", "forward", "backward", "reduce", "optimizer", "save", "exit")
    NUM_BATCHES = 16
    """Of a life before it ends, so that a checkpoint lies between two deaths."""

    def __init__(self, folder: str, **settings: Any) -> None:
        super().__init__(folder, **settings)
        phase, victim = divmod(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), 2)
        doomed = phase < len(self.PHASES) and victim == int(os.environ["RANK"])
        self._phase = self.PHASES[phase] if doomed else ""
        if self._phase == "init":
            die()
        elif self._phase == "first collective":
            torch.distributed.all_reduce = die
        elif self._phase == "exit":
            atexit.register(die)

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        arguments = super().batch(rows)
        if self._read == self.NUM_BATCHES:
            if self._phase == "reduce":
                torch.distributed.all_reduce = die
            elif self._phase == "optimizer":
                sys.modules[torch.optim.Adam.__module__].adam = die  # what each step of Adam calls
            elif self._phase == "save":
                os.environ["DISTOPT_FAILPOINT"] = "after_write:kill"
        return arguments

    def model(self, x: Tensor, y: Tensor) -> None:
        super().model(x, y)
        if self._read == self.NUM_BATCHES and self._phase == "forward":
            die()
        if self._read == self.NUM_BATCHES and self._phase == "backward":
            for _, value in pyro.get_param_store().named_parameters():
                value.register_hook(die)

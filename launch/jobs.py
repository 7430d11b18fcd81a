"""Runs that an engine keeps: submitted once, asked about later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Phase = Literal["unknown", "pending", "running", "stopped", "done", "failed"]


@dataclass(frozen=True)
class State:
    """What an engine says about a run."""

    phase: Phase
    detail: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("stopped", "done", "failed")


class Job(Protocol):
    """A run on an engine that outlives the launcher."""

    def submit(self) -> str:
        """Hands the run over and returns the engine's name for it."""

    def state(self) -> State:
        """Asks the engine how the run is."""

    def logs(self, rank: int) -> str:
        """Returns what the worker, or the host of that number, has printed so far."""

    def stop(self) -> None:
        """Asks the engine to end the run; workers write a last checkpoint."""

"""What happens to a run, and when: drawn from a seed, so that a failure can be played again."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

RUNNERS = ("local", "torchrun", "horovodrun", "mpirun")
STOPS = ("SIGTERM", "SIGINT", "SIGHUP")


@dataclass(frozen=True)
class Event:
    """One disturbance.

    Attributes:
        kind: One of `KINDS`.
        moment: What is waited for, counted in this life of the run: `start` (seconds since the launch), `step` (batches
            that both ranks have read) or `save` (a checkpoint that is being written, after as many batches).
        after: How many of them.
        target: Who is hit: `launcher`, `group` (its process group, as Ctrl-C in a terminal), a rank, or `any` process.
        signal: The name of the signal, where it is one.
        seconds: The pause between two signals, or how long the state lasts.
    """

    kind: str
    moment: str
    after: float
    target: str = ""
    signal: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        unit = {"start": "s after the launch", "step": "batches into a life", "save": "batches, in the next save"}
        details = " ".join(filter(None, (self.signal, self.target, f"{self.seconds:.2f} s" if self.seconds else "")))
        return f"{self.kind}({details}) {self.after:.3g} {unit[self.moment]}"


@dataclass(frozen=True)
class Schedule:
    """A run on one runner, and its disturbances in their order."""

    seed: int
    runner: str
    events: tuple[Event, ...]

    def __str__(self) -> str:
        return f"seed {self.seed} over {self.runner}: " + "; ".join(map(str, self.events))


def _stop(chance: random.Random, moment: tuple[str, float]) -> Event:
    return Event("stop", *moment, chance.choice(["launcher", "group"]), chance.choice(STOPS))


def _stop_twice(chance: random.Random, moment: tuple[str, float]) -> Event:
    """Two within a second are one wish: a terminal and a launcher both pass on the same Ctrl-C."""
    target, number = chance.choice(["launcher", "group"]), chance.choice(STOPS)
    return Event("stop-twice", *moment, target, number, chance.uniform(0.02, 0.8))


def _stop_again(chance: random.Random, moment: tuple[str, float]) -> Event:
    """A second wish: to end at once."""
    return Event("stop-again", *moment, "launcher", chance.choice(STOPS), chance.uniform(1.5, 3.0))


def _hang_up(chance: random.Random, moment: tuple[str, float]) -> Event:
    """The terminal goes away: SIGHUP for its group, and errors for whoever still prints."""
    return Event("hang-up", *moment, "group", "SIGHUP")


def _pause(chance: random.Random, moment: tuple[str, float]) -> Event:
    return Event("pause", *moment, chance.choice(["0", "1", "launcher", "any"]), "SIGSTOP", chance.uniform(0.2, 2.5))


def _kill(chance: random.Random, moment: tuple[str, float]) -> Event:
    return Event("kill", *moment, chance.choice(["0", "0", "1", "1", "launcher", "any"]), "SIGKILL")


def _read_errors(chance: random.Random, moment: tuple[str, float]) -> Event:
    """A rank is killed while checkpoints cannot be read, so that those who start again meet the errors."""
    return Event(
        "read-errors", *moment, chance.choice(["0", "1", "launcher"]), "SIGKILL", chance.choice([0.5, 3.0, 12])
    )


def _disk_full(chance: random.Random, moment: tuple[str, float]) -> Event:
    return Event("disk-full", *moment, seconds=chance.uniform(0.3, 3.0))


KINDS = {
    "stop": _stop,
    "stop-twice": _stop_twice,
    "stop-again": _stop_again,
    "hang-up": _hang_up,
    "pause": _pause,
    "kill": _kill,
    "read-errors": _read_errors,
    "disk-full": _disk_full,
}

PENDING: dict[str, str] = {}
"""Kinds that are known to fail, and why; they take part again when their line goes."""


def enabled_kinds() -> tuple[str, ...]:
    """Returns the kinds that are drawn from: those in DISTOPT_CHAOS_KINDS, or all that do not pend.

    Raises:
        ValueError: A kind is not one of `KINDS`.
    """
    chosen = os.environ.get("DISTOPT_CHAOS_KINDS")
    kinds = tuple(chosen.split(",")) if chosen and chosen != "all" else tuple(KINDS)
    if unknown := set(kinds) - KINDS.keys():
        raise ValueError(f"DISTOPT_CHAOS_KINDS: found {sorted(unknown)}, known: {', '.join(KINDS)} or all")
    return kinds if chosen else tuple(kind for kind in kinds if kind not in PENDING)


def draw(seed: int, kinds: Sequence[str], runners: Sequence[str] = RUNNERS, max_events: int = 4) -> Schedule:
    """Draws a runner and one to `max_events` events; the same arguments give the same schedule."""
    chance = random.Random(seed)
    runner = runners[seed % len(runners)]
    return Schedule(seed, runner, tuple(_event(chance, kinds) for _ in range(chance.randint(1, max_events))))


def _event(chance: random.Random, kinds: Sequence[str]) -> Event:
    kind = chance.choice(kinds)
    moment = chance.choice(["start", "step", "step", "step", "save"])
    if kind in ("read-errors", "disk-full") and moment == "start":
        moment = "step"
    after = chance.uniform(0.0, 12.0) if moment == "start" else float(chance.randint(2, 60))
    return KINDS[kind](chance, (moment, after))

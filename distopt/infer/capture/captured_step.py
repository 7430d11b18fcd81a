"""A program with all that it takes for granted, and the steps for which there may be one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from distopt.infer.capture import program as programs
from distopt.infer.capture.assumptions import Assumptions
from distopt.infer.capture.program import Program
from distopt.infer.capture.recorded_step import RecordedStep
from distopt.infer.capture.recording import Recording, difference, same_bits

logger = logging.getLogger(__name__)

MAX_PROGRAMS = 8
"""Programs of one step function: for other shapes, other plain arguments, other branches."""

FIRST_PAUSE_STEPS = 8
"""Eager steps after values or shapes kept changing, until steps are recorded again; the next pause is twice as long."""

FAILED = -100
"""The status of a program that raised an error."""


class StepResult(NamedTuple):
    """A gradient step's losses, and the parameters whose gradients it computed."""

    loss: Any
    params: list[Tensor]


@dataclass(slots=True)
class CapturedStep:
    """A program, and what it takes for granted.

    Attributes:
        program: What runs.
        recording: As recorded.
        short: What the program was built from.
        assumptions: Plain values that the model's code read.
        params: The parameters that the step names.
        store: All that there were.
        args: The tensors among its arguments when it was recorded.
        buffers: Where the program was told to leave gradients.
        runs: How often it has run.
        failed_checks: How often it has run in vain: a check had another answer, or the loss was not finite.
        failures: How often it has raised an error since it last ran.
        error: The last one.
    """

    program: Program
    recording: Recording
    short: Recording
    assumptions: Assumptions
    params: list[Tensor]
    store: list[Tensor]
    args: list[Tensor]
    buffers: dict[int, Tensor] | None = None
    runs: int = 0
    failed_checks: int = 0
    failures: int = 0
    error: str = ""

    def run(
        self, store: dict[str, Tensor], tensors: list[Tensor], buffers: dict[int, Tensor] | None
    ) -> tuple[int, StepResult | None]:
        """Runs the program if what it takes for granted holds; returns the status, and the result if it ran."""
        if not self.assumptions():
            return programs.CONSTANTS_DIFFER, None
        if self.buffers is not buffers and buffers is not None:
            self.buffers = buffers
            self.program.set_gradient_buffers([buffers.get(id(param)) for param in self.store])

        try:
            status, losses = self.program.run(store, tensors)
        except Exception as error:
            logger.debug("captured step failed, taking it eagerly: %s", error)
            self.error = f"{type(error).__name__}: {error}"
            self.failures += 1
            return FAILED, None
        if status == programs.NOT_FINITE or status >= 0:
            self.failed_checks += 1
        if status != programs.RAN:
            return status, None
        self.runs += 1
        self.failures = 0
        return status, self._result(losses)

    def _result(self, computed: list[float]) -> StepResult:
        recording = self.short
        values = iter(computed)
        losses = [loss if isinstance(loss, float) else next(values) for loss in recording.losses]
        return StepResult(losses[0] if recording.loss_type is None else recording.loss_type(losses), self.params)

    def would_run(self, store: dict[str, Tensor], tensors: list[Tensor]) -> bool:
        """Returns whether everything that the program takes for granted holds now, but for its checks."""
        return self.assumptions() and self.program.matches(store, tensors)

    @property
    def fails_often(self) -> bool:
        """Whether it has run in vain in more than one step of four."""
        total = self.runs + self.failed_checks
        return total >= 8 and self.failed_checks > 0.25 * total


@dataclass(slots=True, eq=False)
class Pending:
    """A recording that waits for an equal one."""

    recording: Recording
    assumptions: Assumptions

    def holds(self) -> bool:
        """Returns whether the values that the recorded step read are there now."""
        return self.assumptions() and holds_constants(self.recording)

    def change(self) -> str | None:
        """Returns what differs now from what the recorded step read; None where nothing does."""
        changed = self.assumptions.changed()
        if changed:
            return f"{', '.join(changed[:3])} changes from step to step"
        return None if holds_constants(self.recording) else "a value read from a tensor changes from step to step"


@dataclass(slots=True)
class Variant:
    """Steps whose arguments have the same structure, shapes and plain values.

    A recording waits until an equal one comes. Recordings of other branches, and of other values that the model reads,
    wait beside it. One whose values held before a step that differs all the same shows that the step depends on
    something that the list does not hold, or that it changes itself what it reads.
    """

    captured: list[CapturedStep] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    misses: int = 0
    num_changes: int = 0  # recordings in a row that read other values than all that waited

    def held(self) -> list[Pending]:
        """Returns the recordings that wait and whose values are there now, before a step."""
        return [pending for pending in self.pending if pending.holds()]

    def match(self, recording: Recording, held: list[Pending]) -> tuple[Pending | None, str | None]:
        """Takes out the recording that has waited for this one; returns it, and why the two are unlike."""
        for pending in held:
            if other_branch(pending.recording, recording):
                continue
            self.pending.remove(pending)
            unlike = pending.change() or difference(pending.recording, recording)
            if unlike is None:
                self.misses = self.num_changes = 0
            return pending, unlike
        return None, None

    def keep(self, pending: Pending, held: list[Pending]) -> bool:
        """Lets a recording wait; returns whether there was room beside those of other branches."""
        self.num_changes = 0 if held else self.num_changes + 1
        if len(self.pending) == MAX_PROGRAMS:
            stale = [each for each in self.pending if each not in held]  # of values that were there once
            if not stale:
                return False
            self.pending.remove(stale[0])
        self.pending.append(pending)
        return True


@dataclass(slots=True)
class Pauses:
    """Eager steps between attempts to capture steps whose values or shapes keep changing; each is twice as long."""

    num_steps: int = FIRST_PAUSE_STEPS
    end: int | None = None  # the last step of the present one

    def begin(self, step: int) -> int:
        """Begins one after a step, and returns its number of steps."""
        num_steps = self.num_steps
        self.end = step + num_steps
        self.num_steps *= 2
        return num_steps

    def is_over(self, step: int) -> bool:
        """Returns whether one ended before a step; says so once."""
        if self.end is None or step <= self.end:
            return False
        self.end = None
        return True


def holds_constants(recording: Recording) -> bool:
    """Returns whether the tensors from outside whose values Python read have these values now."""
    return all(same_bits(recording.foreign[slot], values) for slot, values in recording.compared.items())


def recorded_result(step: RecordedStep) -> StepResult:
    """Returns the result of a step that was taken and recorded."""
    kind = step.recording.loss_type
    return StepResult(step.losses[0] if kind is None else kind(step.losses), step.used)


def other_branch(a: Recording, b: Recording) -> bool:
    """Returns whether two recordings differ because a branch went another way."""
    for one, other in zip(a.checks, b.checks, strict=False):
        if one.slot != other.slot:
            return False
        if one.answer != other.answer:
            return True
    return False

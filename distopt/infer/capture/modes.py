"""Which steps run from a recording: that follows from what was asked for and the step's number, never from time.

All ranks have the same configuration and step number, so they choose alike. They need not agree on more: a recorded
step has the bits of an eager one, so a rank whose model cannot be captured keeps up with ranks whose model can.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

CaptureMode: TypeAlias = Literal["auto", "compiled", "graph", "off"]
"""What is asked for: `auto` leaves the steps that Pyro checks to Pyro, and captures all others as `graph` does.

`compiled` steps have other bits than eager ones, so that it takes them all, from the first one on; `auto` does so from
the step on from which it is to compile.
"""

StepMode: TypeAlias = Literal["eager", "graph", "compiled"]
"""How one step is taken."""

CHECKED_STEPS = 100
"""One step in so many has Pyro's checks all along: a value that leaves its support late is found."""


def check_mode(capture: CaptureMode, compile_from_step: int | None = None) -> None:
    """Refuses what is no mode.

    Args:
        capture: What is asked for.
        compile_from_step: The step, counted from 1, from which it compiles; None for never.

    Raises:
        ValueError: `capture` is none of them, or another one than `auto` is to compile from some step on.
    """
    if capture not in get_args(CaptureMode):
        raise ValueError(f"capture={capture!r}: must be one of {', '.join(map(repr, get_args(CaptureMode)))}.")
    if compile_from_step is not None and (capture != "auto" or compile_from_step < 1):
        raise ValueError(
            f"compile_from_step={compile_from_step!r} with capture={capture!r}: must be 1 or more, with capture='auto'."
        )


def mode_of_step(
    capture: CaptureMode, *, is_checked: bool, step: int = 1, compile_from_step: int | None = None
) -> StepMode:
    """Returns how a step is to be taken.

    Args:
        capture: What is asked for.
        is_checked: Whether Pyro is to check arguments, supports and shapes in this step, which a captured step cannot.
        step: Number of the step, counted from 1.
        compile_from_step: The step from which `auto` compiles, if it does.

    Example:
        >>> [mode_of_step("auto", is_checked=step == 2, step=step, compile_from_step=4) for step in range(1, 5)]
        ['graph', 'eager', 'graph', 'compiled']
    """
    if capture == "auto" and compile_from_step is not None and step >= compile_from_step:
        return "compiled"
    if capture == "off" or (capture == "auto" and is_checked):
        return "eager"
    return "compiled" if capture == "compiled" else "graph"


def is_checked_late(step: int) -> bool:
    """Returns whether a step, counted from 1, is one of those that are checked all along."""
    return step % CHECKED_STEPS == 0

"""Which steps run from a recording: that follows from what was asked for and the step's number, never from time.

All ranks have the same configuration and step number, so they choose alike. They need not agree on more: a recorded
step has the bits of an eager one, so a rank whose model cannot be captured keeps up with ranks whose model can.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

CaptureMode: TypeAlias = Literal["auto", "compiled", "graph", "off"]
"""What is asked for: `auto` leaves the steps that Pyro checks to Pyro, and captures all others as `graph` does.

`compiled` steps have other bits than eager ones, so that it takes them all, from the first one on.
"""

StepMode: TypeAlias = Literal["eager", "graph"]
"""How one step is taken."""

CHECKED_STEPS = 100
"""One step in so many has Pyro's checks all along: a value that leaves its support late is found."""


def check_mode(capture: CaptureMode) -> None:
    """Refuses what is no mode.

    Raises:
        ValueError: `capture` is none of them.
    """
    if capture not in get_args(CaptureMode):
        raise ValueError(f"capture={capture!r}: must be one of {', '.join(map(repr, get_args(CaptureMode)))}.")


def mode_of_step(capture: CaptureMode, *, is_checked: bool) -> StepMode:
    """Returns how a step is to be taken.

    Args:
        capture: What is asked for.
        is_checked: Whether Pyro is to check arguments, supports and shapes in this step, which a captured step cannot.

    Example:
        >>> mode_of_step("auto", is_checked=True), mode_of_step("graph", is_checked=True)
        ('eager', 'graph')
    """
    if capture == "off" or (capture == "auto" and is_checked):
        return "eager"
    return "graph"


def is_checked_late(step: int) -> bool:
    """Returns whether a step, counted from 1, is one of those that are checked all along."""
    return step % CHECKED_STEPS == 0

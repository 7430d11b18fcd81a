"""Steps, and the folders that are named after them."""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex

from distopt.checkpoint.errors import CheckpointError

_FOLDER = re.compile(r"step-(\d{8,19})(-[0-9a-f]{8,32})?")


def step_of(folder: str) -> int | None:
    """Returns the step that a folder's name tells, None for another name.

    Example:
        >>> step_of("step-00000123"), step_of(".tmp-00000123-5f0c")
        (123, None)
    """
    match = _FOLDER.fullmatch(folder)
    return int(match[1]) if match else None


def step_number(step: SupportsIndex) -> int:
    """Returns a step as an int, numpy's and torch's included.

    Raises:
        CheckpointError: for what no folder can be named after, or found by again.

    Example:
        >>> step_number(100)
        100
    """
    number = -1 if isinstance(step, bool) or not hasattr(step, "__index__") else operator.index(step)
    if not 0 <= number < 10**19:
        raise CheckpointError(f"step {step!r}: steps are whole numbers, 0 or more, with at most 19 digits.")
    return number

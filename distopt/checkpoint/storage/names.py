"""Names in a directory of checkpoints: which folder is a checkpoint, and of which step.

step-00000123              a checkpoint, where folders can be renamed
step-00000123-5f0c…        an attempt at one, and a checkpoint once it has a manifest, where they cannot
.tmp-00000123-5f0c…        an attempt that is being written, where folders can be renamed
.del-step-00000123-7a31…   a checkpoint that is being deleted
.lock                      held by the job that writes here

`distopt.run_files.step_of` tells which names are those of checkpoints.
"""

from __future__ import annotations

import operator
import os
import re
from typing import SupportsIndex

from distopt.checkpoint.errors import CheckpointError

LOCK = ".lock"
"""Name of the file, in the root, that holds the token of the job that writes there."""

# Files of the user that merely look similar (`.tmp-notes`) must not match, since what matches is deleted.
_LEFTOVER = re.compile(r"\.tmp-\d{8,19}-[0-9a-f]{8,32}|\.del-step-\d{8,19}-[0-9a-f]{8}")


def work_folder(step: int, attempt: str, *, rename: bool) -> str:
    """Returns the name of the folder that an attempt is written into.

    Args:
        step: Of the checkpoint.
        attempt: Unique for each try, 8 to 32 hexadecimal digits.
        rename: Whether the storage commits a folder by renaming it, see `Storage.commits_by_rename`.

    Example:
        >>> work_folder(123, "5f0c1a2b", rename=True), work_folder(123, "5f0c1a2b", rename=False)
        ('.tmp-00000123-5f0c1a2b', 'step-00000123-5f0c1a2b')
    """
    return f"{'.tmp' if rename else 'step'}-{step:08d}-{attempt}"


def final_folder(step: int, attempt: str, *, rename: bool) -> str:
    """Returns the name of the folder once it is committed: one per step, or without renaming that of the attempt.

    Example:
        >>> final_folder(123, "5f0c1a2b", rename=True), final_folder(123, "5f0c1a2b", rename=False)
        ('step-00000123', 'step-00000123-5f0c1a2b')
    """
    return f"step-{step:08d}" if rename else work_folder(step, attempt, rename=False)


def doomed_folder(folder: str) -> str:
    """Returns a new name for a checkpoint that is to be deleted; no two calls return the same."""
    return f".del-{folder}-{os.urandom(4).hex()}"


def is_leftover(folder: str) -> bool:
    """Returns whether a folder's name is that of an attempt or deletion, and of nothing else that lies there.

    Example:
        >>> is_leftover(".tmp-00000123-5f0c1a2b"), is_leftover(".tmp-notes")
        (True, False)
    """
    return _LEFTOVER.fullmatch(folder) is not None


def step_number(step: SupportsIndex) -> int:
    """Returns a step as an int; numpy's and torch's integers are accepted.

    Raises:
        CheckpointError: No folder can be named after it, or found again by its name.

    Example:
        >>> step_number(100)
        100
    """
    number = -1 if isinstance(step, bool) or not hasattr(step, "__index__") else operator.index(step)
    if not 0 <= number < 10**19:
        raise CheckpointError(f"step {step!r}: steps are whole numbers, 0 or more, with at most 19 digits.")
    return number

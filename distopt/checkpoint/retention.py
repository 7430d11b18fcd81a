"""Which checkpoints are kept: the newest ones and every m-th, and never fewer than a fallback needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.reader import Candidate, candidates, verify
from distopt.checkpoint.storage.base import Storage
from distopt.checkpoint.storage.names import is_leftover
from distopt.run_files import MANIFEST, step_of

MIN_LAST = 2
"""One checkpoint may turn out to be damaged; the one before it is what a run then resumes from."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a run are kept.

    Args:
        last: The number of newest checkpoints to keep, at least 2.
        every_steps: Checkpoints at multiples of this many steps are also kept, without limit; None keeps only the
            newest ones.
        best: The step of a checkpoint that is kept besides.

    Raises:
        ValueError: A number is too small.

    Example:
        >>> Retention(5, every_steps=1000)
        Retention(last=5, every_steps=1000)
    """

    last: int = 3
    every_steps: int | None = None
    best: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.last < MIN_LAST:
            raise ValueError(
                f"Retention: last is {self.last}; keep at least {MIN_LAST} checkpoints, so that there is one to fall "
                "back to if the newest is damaged"
            )
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(
                f"Retention: every_steps is {self.every_steps}; give 1 or more, or None to keep only the newest ones"
            )

    def surplus(self, newest_first: Sequence[Candidate]) -> list[str]:
        """Returns the folders to delete, oldest first.

        Besides those that are too many, these are the ones of a future that the run gave up by going back to an older
        step. Unreadable ones stay while they are among the newest, so that they can be examined.
        """
        readable = [each for each in newest_first if each.manifest is not None]
        if not readable:
            return []

        # What the run gave up is left out before the newest are counted: else abandoned checkpoints, which have higher
        # steps, would push out those that the run continues from. Folders without a manifest are of no generation:
        # damaged ones go when they are old, those that could not be read stay.
        current = [each for each in readable if not _is_abandoned(each, readable)]
        oldest = min(each.step for each in current[: self.last])
        surplus: list[str] = []
        for each in newest_first:
            milestone = self.every_steps is not None and each.step % self.every_steps == 0 and each.manifest is not None
            if each.is_unreadable:
                continue
            if _is_abandoned(each, current) or (each.step < oldest and not milestone and each.step != self.best):
                surplus.append(each.folder)
        return surplus[::-1]


def _is_abandoned(candidate: Candidate, readable: Sequence[Candidate]) -> bool:
    """Returns whether a later generation has saved this step or one before it."""
    return any(other.age[0] > candidate.age[0] and other.step <= candidate.step for other in readable)


def retain(storage: Storage, keep: Retention) -> None:
    """Deletes the checkpoints that are not kept.

    The newest one is read back first: nothing is deleted before its successor is known to be readable.

    Raises:
        CheckpointError: The newest checkpoint is not what was written, or cannot be read; nothing is deleted then.
        OSError: From the disk.
    """
    # An interrupted deletion leaves a folder that has been renamed already, which the next call removes. So it does not
    # matter where in this function a process ends.
    newest_first = candidates(storage)
    surplus = keep.surplus(newest_first)
    if surplus:
        newest = next(each for each in newest_first if each.manifest is not None)
        try:
            verify(storage, newest.folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Older checkpoints are kept.") from error

    for folder in surplus:
        # Renamed before it is deleted: a folder that is half deleted must not look like a damaged checkpoint.
        aside = storage.set_aside(folder)
        failpoint("after_set_aside", 0)
        storage.remove(aside)
        logger.info("deleted %s/%s", storage.root, folder)
    remove_leftovers(storage)
    failpoint("after_retention", 0)


def remove_leftovers(storage: Storage, in_progress: str = "") -> None:
    """Deletes what attempts that died and interrupted deletions have left; only the holder of the lock may.

    Args:
        storage: Where.
        in_progress: A folder that stays: in an object store, other ranks may be writing to it already.
    """
    # Leftovers only cost space: what keeps them from being found or deleted must not fail a save.
    try:
        folders = storage.folders()
    except OSError as error:
        logger.warning("%s: leftovers are not deleted, since it cannot be listed: %s", storage.root, error)
        return
    for folder in folders:
        try:
            if folder != in_progress and _is_left_over(storage, folder):
                storage.remove(folder)
        except OSError as error:
            logger.warning("%s/%s is left over and cannot be deleted: %s", storage.root, folder, error)


def _is_left_over(storage: Storage, folder: str) -> bool:
    """Returns whether a folder is of an attempt that died, or of an interrupted deletion."""
    unfinished = not storage.commits_by_rename and step_of(folder) is not None
    return is_leftover(folder) or (unfinished and MANIFEST not in storage.files(folder))

"""Which checkpoints stay: the last few and every m-th, and never fewer than what a fallback needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.failpoint import failpoint
from distopt.checkpoint.reader import Candidate, candidates, verify
from distopt.checkpoint.storage.base import Storage

MIN_KEPT = 2
logger = logging.getLogger(__name__)


def surplus(newest_first: Sequence[Candidate], keep_last: int, keep_every_steps: int | None) -> list[str]:
    """Returns the folders to delete, oldest first.

    Beside those that are too many, these are the ones of a future that the run gave up by going back to an older step.
    Unreadable ones stay while they are among the newest: somebody may want to look at them.
    """
    whole = [one for one in newest_first if one.manifest is not None]
    if not whole:
        return []
    whole = [one for one in whole if not _is_abandoned(one, whole)]
    kept = whole[: max(keep_last, MIN_KEPT)]
    oldest = min(one.step for one in kept)
    doomed = []
    for one in newest_first:
        milestone = keep_every_steps is not None and one.step % keep_every_steps == 0 and one.manifest is not None
        if _is_abandoned(one, whole) or (one.step < oldest and not milestone):
            doomed.append(one.folder)
    return doomed[::-1]


def _is_abandoned(one: Candidate, whole: Sequence[Candidate]) -> bool:
    """Has a later generation saved this step or one before it?"""
    return any(other.age[0] > one.age[0] and other.step <= one.step for other in whole)


def retain(storage: Storage, keep_last: int, keep_every_steps: int | None) -> None:
    """Deletes what is not kept, once the newest has been read back: nothing goes before its successor is proven.

    Raises:
        CheckpointError: when the newest checkpoint does not read as it was written; nothing is deleted then.
        OSError: from the disk.
    """
    found = candidates(storage)
    doomed = surplus(found, keep_last, keep_every_steps)
    if doomed:
        newest = next(one for one in found if one.manifest is not None)
        try:
            verify(storage, newest.folder)
        except CheckpointError as error:
            raise CheckpointError(f"{error} Older checkpoints are kept.") from error
    for folder in doomed:
        aside = storage.set_aside(folder)
        failpoint("after_set_aside", 0)
        storage.remove(aside)
        logger.info("deleted %s/%s", storage.root, folder)
    remove_leftovers(storage)
    failpoint("after_retention", 0)


def remove_leftovers(storage: Storage, under_way: str = "") -> None:
    """Deletes what dead attempts and unfinished deletions have left; only the writer that holds the lock may.

    Args:
        storage: where.
        under_way: a folder that stays: in an object store other ranks may be writing to it already.
    """
    for folder in storage.leftovers():
        if folder == under_way:
            continue
        try:
            storage.remove(folder)
        except OSError as error:
            logger.warning("%s/%s is left over, and cannot be deleted: %s", storage.root, folder, error)

"""What the ranks of one run agree on about their directory, through the process group and before training needs it.

Each function gathers one small JSON value per rank and lets every rank decide from all of them, so that all ranks take
the same branch and raise the same error.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from distopt.backends.base import Backend
from distopt.checkpoint.chunks import read_small
from distopt.checkpoint.errors import CheckpointError, UnreadableCheckpointError, describe_error
from distopt.checkpoint.reader import known_manifests
from distopt.checkpoint.retention import remove_leftovers
from distopt.checkpoint.storage.base import Storage
from distopt.checkpoint.storage.names import LOCK
from distopt.checkpoint.storage.retries import retried

_MAX_TOKEN_BYTES = 4096


def agree_no_error(backend: Backend, error: Exception | None, where: str) -> None:
    """Raises on all ranks if one of them has an error, naming rank and cause; collective.

    An error that one rank alone raised would leave the others waiting in their next collective, and all that they could
    report is the timeout.
    """
    unreadable = isinstance(error, UnreadableCheckpointError)
    errors = backend.all_gather_json(None if error is None else [describe_error(error), unreadable])
    for rank, each in enumerate(errors):
        if each:
            source = f"{where}, rank {rank} of {len(errors)}" if len(errors) > 1 else where
            kind = UnreadableCheckpointError if each[1] else CheckpointError
            raise kind(f"{source}: {each[0]}") from error


def claim_directory(backend: Backend, storage: Storage) -> ExitStack:
    """Takes the directory for this job, on all ranks or on none, and removes what dead attempts left; collective.

    Returns:
        What holds the directory; closing it lets another job write there.

    Raises:
        DirectoryInUseError: Another job has it (on rank 0; the others raise the same message).
        CheckpointError: A rank cannot write there, or does not see what rank 0 writes.
    """
    # Rank 0 locks and clears the directory for all; what any rank finds wrong is agreed before the first of them
    # raises.
    claimed = ExitStack()
    error: Exception | None = None
    token = ""
    try:
        if backend.rank == 0:
            token = retried(lambda: claimed.enter_context(storage.lock()))
            remove_leftovers(storage)
        storage.check_writable()
    except Exception as caught:
        error = caught

    try:
        agree_no_error(backend, error, f"{storage.root} cannot hold checkpoints")

        # A path may be a local folder of each host: only a rank that reads rank 0's token sees the same files.
        token = backend.all_gather_json(token)[0]
        seen: str | None = None
        try:
            seen = _token(storage)
        except OSError as caught:
            error = caught
        agree_no_error(backend, error, f"{storage.root} cannot hold checkpoints")
        sees_token = backend.all_gather_json(seen == token)
        blind = [rank for rank, same in enumerate(sees_token) if not same]
        if blind:
            raise CheckpointError(
                f"{storage.root}: rank(s) {blind} of {len(sees_token)} do not see what rank 0 writes there. The "
                "directory must be on a file system that all workers share; or give the URL of an object store."
            )
    except CheckpointError:
        claimed.close()
        if isinstance(error, CheckpointError):
            raise error from None
        raise
    return claimed


def _token(storage: Storage) -> str:
    """Returns the token of the job that holds the directory, as seen from here; empty where there is none."""
    try:
        return read_small(storage, "", LOCK, _MAX_TOKEN_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return ""


def newest_known(backend: Backend, storage: Storage) -> tuple[int, str]:
    """Returns generation and attempt of the newest checkpoint as rank 0 sees it, (-1, "") without one; collective.

    Only rank 0 needs them, since it writes the manifests. The others take part to raise its error, and get (-1, "").

    Raises:
        UnreadableCheckpointError: A checkpoint cannot be read; on all ranks.
    """
    newest = (-1, "")
    failure: Exception | None = None
    try:
        known = known_manifests(storage) if backend.rank == 0 else []
        newest = (known[0].generation, known[0].attempt) if known else newest
    except Exception as error:
        failure = error
    agree_no_error(backend, failure, storage.root)
    return newest


def agree_to_save(step: int, messages: Sequence[dict[str, Any]]) -> str:
    """Returns why a save is left out, decided from the messages of all ranks; empty when it is to be written.

    Raises:
        CheckpointError: On all ranks, when one of them cannot take part.
    """
    for rank, message in enumerate(messages):
        if message["error"]:
            raise CheckpointError(f"step {step}, rank {rank} of {len(messages)}: {message['error']}")

    steps = [message["step"] for message in messages]
    if len(set(steps)) > 1:
        raise CheckpointError(f"ranks save different steps: {steps}. Call save at the same steps on every rank.")
    busy = [rank for rank, message in enumerate(messages) if message["busy"]]
    if busy:
        return f"skipped: rank(s) {busy} are still writing the previous checkpoint"
    return "already saved" if messages[0]["saved"] else ""

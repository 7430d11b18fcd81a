"""What the ranks of one run agree on about their directory, through the process group and before training needs it."""

from __future__ import annotations

from typing import Any

from distopt.backends.base import Backend, Json
from distopt.checkpoint.commit import describe_error
from distopt.checkpoint.errors import CheckpointError
from distopt.checkpoint.retention import remove_leftovers
from distopt.checkpoint.storage.base import Storage


def gather(backend: Backend, value: Json) -> list[Any]:
    """Returns every rank's value, without a collective in a world of one."""
    return backend.all_gather_json(value) if backend.world_size > 1 else [value]


def agree_no_error(backend: Backend, error: Exception | None, where: str) -> None:
    """Raises on all ranks when one has an error, naming rank and cause; collective."""
    texts = gather(backend, None if error is None else describe_error(error))
    for rank, text in enumerate(texts):
        if text:
            place = f"{where}, rank {rank} of {len(texts)}" if len(texts) > 1 else where
            raise CheckpointError(f"{place}: {text}") from error


def claim(backend: Backend, storage: Storage) -> None:
    """Takes the directory for this job, on all ranks or on none, and removes what dead attempts left; collective.

    Raises:
        DirectoryInUseError: when another job has it (on rank 0; the others raise the same words).
        CheckpointError: when a rank cannot write there, or does not see what rank 0 writes.
    """
    error: Exception | None = None
    token = ""
    try:
        if backend.rank == 0:
            token = storage.lock()
            remove_leftovers(storage)
        storage.check_writable()
    except Exception as caught:
        error = caught
    try:
        agree_no_error(backend, error, f"{storage.root} cannot hold checkpoints")
        token = gather(backend, token)[0]
        seen = gather(backend, storage.lock_token() == token)
        blind = [rank for rank, same in enumerate(seen) if not same]
        if blind:
            raise CheckpointError(
                f"{storage.root}: rank(s) {blind} of {len(seen)} do not see what rank 0 writes there. The directory "
                "must be on a file system that all workers share; or give the URL of an object store."
            )
    except CheckpointError:
        storage.unlock()
        if isinstance(error, CheckpointError):
            raise error from None
        raise


def agree_to_save(step: int, words: list[dict[str, Any]]) -> str:
    """Returns why a save is left out, by the words of all ranks; empty when it goes on.

    Raises:
        CheckpointError: on all ranks, when one of them cannot take part.
    """
    for rank, word in enumerate(words):
        if word["error"]:
            raise CheckpointError(f"step {step}, rank {rank} of {len(words)}: {word['error']}")
    steps = [word["step"] for word in words]
    if len(set(steps)) > 1:
        raise CheckpointError(f"ranks save different steps: {steps}. Call save at the same steps on every rank.")
    busy = [rank for rank, word in enumerate(words) if word["busy"]]
    if busy:
        return f"not saved: rank(s) {busy} still write the save before"
    return "saved already" if words[0]["saved"] else ""

"""What can go wrong between ranks, raised on every rank with the same cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distopt.backends.base import Backend, Json


class DisagreementError(RuntimeError):
    """Ranks differ in a parameter, an option or the step they are at; nothing was stepped."""


class PeerError(RuntimeError):
    """Another rank raised in its model, guide or data; its message and traceback are in this one's."""


class DriftError(RuntimeError):
    """Replicas that must be equal are not."""


@contextmanager
def raised_on_all(backend: Backend) -> Iterator[None]:
    """Tells the other ranks of an error within, where they are about to call `gather_unless_failed`, and raises it.

    An error that they know of passes: what all ranks raise together, and what was told within.
    """
    try:
        yield
    except (PeerError, DisagreementError):
        raise
    except Exception as error:
        if getattr(error, "is_announced", False):
            raise
        gather_unless_failed(backend, error)


def gather_unless_failed(backend: Backend, mine: Json | Exception) -> list[Any]:
    """Returns what each rank tells the others before a collective, unless a rank has an error in its place.

    A rank that fails where the others may be about to communicate calls this with its error: their next call of this
    function then raises it too, rather than to wait until their timeout.

    Args:
        backend: Link to the other ranks.
        mine: This rank's value, or why it has none.

    Raises:
        Exception: `mine`, if it is an error.
        PeerError: Another rank has one; the message has its rank and cause.

    Cost:
        One `all_gather_json`.
    """
    if isinstance(mine, Exception):
        backend.all_gather_json([f"{type(mine).__name__}: {mine}", None])
        mine.is_announced = True  # type: ignore[attr-defined]
        raise mine
    by_rank = backend.all_gather_json(["", mine])
    for rank, (failure, _) in enumerate(by_rank):
        if failure:
            raise PeerError(f"rank {rank} of {len(by_rank)} raised {failure}")
    return [value for _, value in by_rank]


def ranks_by_value(values: Mapping[int, str]) -> dict[str, str]:
    """Returns which ranks have each value.

    Example:
        >>> ranks_by_value({0: "(3,)", 1: "(4,)", 2: "(3,)"})
        {'(3,)': 'rank 0, 2', '(4,)': 'rank 1'}
    """
    ranks: dict[str, list[str]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(str(rank))
    return {value: f"rank {', '.join(each)}" for value, each in ranks.items()}

"""Whose `join` is open: a rank that is done follows the calls of one optimizer, and cannot know another's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from distopt.backends import Backend

_OPEN: WeakKeyDictionary[Backend, object] = WeakKeyDictionary()


@contextmanager
def joining(backend: Backend, owner: object) -> Iterator[None]:
    """Lets `owner` alone call collectives of `backend` meanwhile.

    Raises:
        RuntimeError: Another owner's is open.
    """
    check_alone(backend, owner)
    _OPEN[backend] = owner
    try:
        yield
    finally:
        _OPEN.pop(backend, None)


def is_joining(backend: Backend) -> bool:
    """Whether ranks may have run out of data, and follow."""
    return backend in _OPEN


def check_alone(backend: Backend, owner: object) -> None:
    """Raises RuntimeError when the join of another owner is open, before ranks make calls that do not match."""
    if _OPEN.get(backend, owner) is not owner:
        raise RuntimeError(
            "join() of one DistributedOptimizer is open and another one is called: a rank that has run out of data "
            "follows the one alone, so the ranks' calls would not match. Give one optimizer all parameters (optim_args "
            "may be a callable of the name, see distopt.optim.by_name), or call the other one outside of join()."
        )

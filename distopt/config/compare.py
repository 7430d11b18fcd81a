"""Where two configurations differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()
"""Stands for the value of a key that is not there."""


def differences(old: Any, new: Any, free: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted keys at which two configurations differ, with both values.

    Args:
        old: Nested mappings; lists are compared as a whole.
        new: Likewise.
        free: Dotted keys that may differ, with all below them.
        prefix: The dotted key of both, empty for whole configurations.

    Example:
        >>> list(differences({"optim": {"lr": 1}, "log": 1}, {"optim": {"lr": 2}, "seed": 1}, free=["log"]))
        [('optim.lr', 1, 2), ('seed', absent, 1)]
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{prefix}.{key}" if prefix else str(key)
            if place not in free:
                yield from differences(old.get(key, ABSENT), new.get(key, ABSENT), free, place)
    elif old != new:
        yield prefix, old, new

"""What can go wrong between ranks, raised on every rank with the same cause."""

from __future__ import annotations

from collections.abc import Mapping


class DisagreementError(RuntimeError):
    """Ranks differ in a parameter, an option or the step they are at; nothing was stepped."""


class PeerError(RuntimeError):
    """Another rank raised in its model, guide or data; its message and traceback are in this one's."""


class DriftError(RuntimeError):
    """Replicas that must be equal are not."""


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

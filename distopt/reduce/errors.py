"""What can go wrong between ranks, raised on every rank with the same cause."""

from __future__ import annotations


class DisagreementError(RuntimeError):
    """Ranks differ in a parameter, a setting or the step they are at; nothing was stepped."""


class PeerError(RuntimeError):
    """Another rank raised in its model, guide or data; its message and traceback are in this one's."""


class DriftError(RuntimeError):
    """Replicas that must be equal are not."""

"""Errors between ranks reach other processes whole, and name the ranks by what they have."""

from __future__ import annotations

import pickle

import pytest

from distopt.reduce.errors import DisagreementError, DriftError, PeerError, ranks_by_value


def test_ranks_are_listed_with_the_value_that_they_share():
    assert ranks_by_value({0: "a", 1: "b", 2: "a", 3: "c", 4: "a"}) == {
        "a": "rank 0, 2, 4",
        "b": "rank 1",
        "c": "rank 3",
    }
    assert ranks_by_value({}) == {}


@pytest.mark.parametrize("kind", [DisagreementError, PeerError, DriftError])
def test_error_is_told_from_others_and_survives_a_queue_between_processes(kind):
    copied = pickle.loads(pickle.dumps(kind("rank 1 of 2: x")))
    assert (type(copied), str(copied)) == (kind, "rank 1 of 2: x")
    assert not any(issubclass(kind, other) for other in (DisagreementError, PeerError, DriftError) if other != kind)

"""Errors of checkpoints tell what to do about them, and are one text for logs and other ranks."""

from __future__ import annotations

import errno

import pytest

from distopt.checkpoint import errors


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.CorruptCheckpointError("step-00000001: 3 bytes, expected 4"), "step-00000001: 3 bytes, expected 4"),
        (KeyError("x"), "KeyError: 'x'"),
        (OSError(errno.ENOSPC, "No space left"), "OSError: [Errno 28] No space left"),
        (ValueError(), "ValueError: "),
    ],
)
def test_error_that_explains_itself_is_its_message_and_any_other_has_its_type(error, text):
    assert errors.describe_error(error) == text


def test_damage_is_no_missing_answer_and_every_error_is_caught_as_one_kind():
    # Whoever falls back to an older checkpoint catches damage alone: one that cannot be read may be good.
    assert not issubclass(errors.UnreadableCheckpointError, errors.CorruptCheckpointError)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) == 6 and all(issubclass(kind, errors.CheckpointError) for kind in kinds)

"""What can go wrong with a checkpoint, by what the caller can do about it."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the message says which, where, and what to do."""


class CorruptCheckpointError(CheckpointError):
    """What is on disk is not what was written: the caller falls back to an older checkpoint."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint could not be read, which proves nothing about it: it stays, and the caller must not fall back."""


class NonfiniteStateError(CheckpointError):
    """A state holds NaN or infinity where training puts none: it is not saved, and the last good checkpoint remains."""


class ConfigMismatchError(CheckpointError):
    """The checkpoint was written by a run with another configuration; the message has the differences."""


class DirectoryInUseError(CheckpointError):
    """Another running job writes its checkpoints into this directory."""


def describe_error(error: BaseException) -> str:
    """Returns an error as one text for logs, notes and other ranks.

    The message alone where it explains itself, with the type where it does not: `KeyError: 'x'`.
    """
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"

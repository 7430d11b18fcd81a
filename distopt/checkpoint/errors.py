"""What can go wrong with a checkpoint, by what the caller can do about it."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, found or read; the message says which, where, and what to do."""


class CorruptCheckpointError(CheckpointError):
    """What is on disk is not what was written: the caller falls back to an older checkpoint."""


class ConfigMismatchError(CheckpointError):
    """The checkpoint was written by a run of another configuration; the differences are in the message."""


class DirectoryInUseError(CheckpointError):
    """Another running job writes its checkpoints into this directory."""

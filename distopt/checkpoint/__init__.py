"""The state of a run on disk: safe to load, never half-written."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distopt.checkpoint.checkpointer import Checkpointer
    from distopt.checkpoint.errors import (
        CheckpointError,
        ConfigMismatchError,
        CorruptCheckpointError,
        DirectoryInUseError,
        NonfiniteStateError,
        UnreadableCheckpointError,
    )
    from distopt.checkpoint.restore import Restored
    from distopt.checkpoint.retention import Retention
    from distopt.checkpoint.storage.base import ReadStream, Storage, WriteStream, register_storage
    from distopt.constraints import register_constraint

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "ConfigMismatchError",
    "CorruptCheckpointError",
    "DirectoryInUseError",
    "NonfiniteStateError",
    "ReadStream",
    "Restored",
    "Retention",
    "Storage",
    "UnreadableCheckpointError",
    "WriteStream",
    "register_constraint",
    "register_storage",
]

_HOME = {
    "CheckpointError": "distopt.checkpoint.errors",
    "Checkpointer": "distopt.checkpoint.checkpointer",
    "ConfigMismatchError": "distopt.checkpoint.errors",
    "CorruptCheckpointError": "distopt.checkpoint.errors",
    "DirectoryInUseError": "distopt.checkpoint.errors",
    "NonfiniteStateError": "distopt.checkpoint.errors",
    "ReadStream": "distopt.checkpoint.storage.base",
    "Restored": "distopt.checkpoint.restore",
    "Retention": "distopt.checkpoint.retention",
    "Storage": "distopt.checkpoint.storage.base",
    "UnreadableCheckpointError": "distopt.checkpoint.errors",
    "WriteStream": "distopt.checkpoint.storage.base",
    "register_constraint": "distopt.constraints",
    "register_storage": "distopt.checkpoint.storage.base",
}


def __getattr__(name: str) -> Any:
    """Imports torch and pyro only when something that needs them is used: writing a checkpoint needs neither."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'distopt.checkpoint' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

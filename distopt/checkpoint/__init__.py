"""The state of a run on disk: safe to load, never half-written."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distopt.checkpoint.checkpointer import Checkpointer
    from distopt.checkpoint.constraints import register_constraint
    from distopt.checkpoint.errors import (
        CheckpointError,
        ConfigMismatchError,
        CorruptCheckpointError,
        DirectoryInUseError,
    )
    from distopt.checkpoint.resume import Restored

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "ConfigMismatchError",
    "CorruptCheckpointError",
    "DirectoryInUseError",
    "Restored",
    "register_constraint",
]

_HOME = {
    "CheckpointError": "errors",
    "Checkpointer": "checkpointer",
    "ConfigMismatchError": "errors",
    "CorruptCheckpointError": "errors",
    "DirectoryInUseError": "errors",
    "Restored": "resume",
    "register_constraint": "constraints",
}


def __getattr__(name: str) -> Any:
    """Imports torch and pyro only when something that needs them is asked for: the writer needs neither."""
    if name in _HOME:
        return getattr(import_module(f"distopt.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'distopt.checkpoint' has no attribute {name!r}")

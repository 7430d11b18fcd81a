"""What of a `RunConfig` is recorded with the checkpoints of its run, and compared when the run resumes."""

from __future__ import annotations

from typing import Any

from distopt.config import RunConfig, comparable

SECRET = ("launch.env",)
"""Keys that are never written down: environments hold secrets."""


def recorded_config(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as checkpoints record it: plain JSON values, without secrets.

    Keys that came with a later version of distopt are left out while they have the value that runs had before (see
    `distopt.config.comparable`), so that those runs can resume.
    """
    recorded: dict[str, Any] = comparable(without_secrets(config))
    return recorded


def without_secrets(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as JSON values without the keys of `SECRET`."""
    values = config.as_json()
    for key in SECRET:
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section[each]
        section.pop(name, None)
    return values

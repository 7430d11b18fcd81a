"""The platforms: each renders a plan for an engine that is there. An unknown name is refused by `distopt.config`."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from .base import Platform


def platform(name: str) -> Platform:
    """Returns the platform `name`, a module of this package that holds a class `Platform`."""
    return cast(Platform, import_module(f".{name}", __package__).Platform())

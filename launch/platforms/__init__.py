"""The platforms: each renders a plan for a launcher that is there. An unknown name is refused by `distopt.config`."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from .base import Platform

_HOMES = {"kubernetes": ".kubernetes.platform", "slurm": ".slurm.platform"}


def platform(name: str) -> Platform:
    """Returns the platform `name`: the class `Platform` of the module that holds it."""
    return cast(Platform, import_module(_HOMES.get(name, f".{name}"), __package__).Platform())

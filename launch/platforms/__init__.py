"""The platforms: each renders a plan for a launcher or a cluster that is there.

`launch.platform` names one of those below, or a platform of the user's as `module:Name`; `Platform` has an example.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module

from distopt.config.plugins import is_reference, load_subclass

from .base import Platform

__all__ = ["PLATFORMS", "Platform", "load_platform"]

KEY = "launch.platform"

PLATFORMS: Mapping[str, str] = {
    "local": ".local:LocalPlatform",
    "torchrun": ".torchrun:TorchrunPlatform",
    "horovodrun": ".horovodrun:HorovodrunPlatform",
    "mpirun": ".mpirun:MpirunPlatform",
    "slurm": ".slurm.platform:SlurmPlatform",
    "kubernetes": ".kubernetes.platform:KubernetesPlatform",
}
"""What the plain names of `launch.platform` stand for; a module is imported when its platform is chosen."""


def load_platform(name: str) -> Platform:
    """Returns the platform that `launch.platform` names, one of `PLATFORMS` or `module:Name`.

    Raises:
        ConfigError: `module:Name` cannot be imported, or is no subclass of `Platform` with all that it requires.
    """
    if is_reference(name):
        return _load_users(name)
    module, _, class_name = PLATFORMS[name].partition(":")
    platform: Platform = getattr(import_module(module, __package__), class_name)()
    return platform


def _load_users(reference: str) -> Platform:
    # `python -m distopt.launch` and the workers search the current folder first, the script `distopt` does not.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    return load_subclass(reference, KEY, Platform)()

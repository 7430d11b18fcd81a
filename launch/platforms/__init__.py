"""The platforms: each renders a plan for a launcher that is there. An unknown name is refused by `distopt.config`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from .base import Platform

PLATFORMS: Mapping[str, str] = {
    "local": ".local:LocalPlatform",
    "torchrun": ".torchrun:TorchrunPlatform",
    "horovodrun": ".horovodrun:HorovodrunPlatform",
    "mpirun": ".mpirun:MpirunPlatform",
    "slurm": ".slurm.platform:SlurmPlatform",
    "kubernetes": ".kubernetes.platform:KubernetesPlatform",
}
"""What the values of `launch.platform` stand for; a module is imported when its platform is chosen."""


def load_platform(name: str) -> Platform:
    """Returns the platform that `launch.platform` names."""
    module, _, class_name = PLATFORMS[name].partition(":")
    chosen: Platform = getattr(import_module(module, __package__), class_name)()
    return chosen

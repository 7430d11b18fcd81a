"""The platforms: each renders a plan for a launcher that is there. An unknown name is refused by `distopt.config`.

A platform of the user's is a subclass of `Platform` in a module of the user's, named as `launch.platform: module:Name`.
Two methods are enough, here for a command that takes care of the rest:

    import sys

    from distopt.launch.findings import Finding
    from distopt.launch.plan import Command, Plan, env_of_workers, run_files, worker_argv
    from distopt.launch.platforms import Platform

    class Parallel(Platform):
        def check(self, config):
            if config.launch.hosts:
                yield Finding("launch.hosts", "found hosts, but parallel-run starts workers here", "remove them")

        def plan(self, config):
            command = Command(("parallel-run", *worker_argv(config, sys.executable)), env_of_workers(config))
            return Plan("parallel", (command,), run_files(config))

Its launcher must set the rank and world size of each worker in variables that `distopt.init` knows, such as `RANK`,
`WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`.
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

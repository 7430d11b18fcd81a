"""The contract of platforms: all that the rest of `launch` asks one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from distopt.config import RunConfig

from ..jobs import SubmittedJob
from ..plan import Plan


class Platform(ABC):
    """One way to start workers: through a launcher such as torchrun, or as a job of a cluster.

    An instance is made without arguments and keeps no state; all that it answers follows from the configuration. It
    first renders a plan, which touches nothing and is what `--dry-run` prints; the plan is then carried out by
    `distopt launch` itself, or by the cluster for a platform that has a `job`.

    Two members must be there, `problems` and `plan`. The others have the defaults of a platform that starts the code of
    this machine, on hosts that the configuration names, below a `distopt launch` that follows the run to its end.
    """

    finds_hosts: ClassVar[bool] = False
    """Whether the platform chooses the hosts itself: `launch.nodes` is their number, nothing here is asked of them."""

    @abstractmethod
    def problems(self, config: RunConfig) -> list[str]:
        """Returns what would keep this platform from starting the run, each with its fix; empty when all is well."""

    @abstractmethod
    def plan(self, config: RunConfig) -> Plan:
        """Returns the commands and files that start the run."""

    def job(self, config: RunConfig) -> SubmittedJob | None:
        """Returns the run as a cluster keeps it, submitted or not yet; None where `distopt launch` keeps it itself."""
        return None

    def record_dir(self, config: RunConfig) -> Path:
        """Returns the folder on this machine where `distopt launch` keeps its record of the run."""
        return config.run_dir

    def ranks(self, config: RunConfig) -> range:
        """Returns the numbers by which `distopt logs --rank` asks for output."""
        return range(config.launch.world_sizes[-1])

    def image(self, config: RunConfig) -> str | None:
        """Returns what holds the code and environment of the workers; None where these are this machine's."""
        return None

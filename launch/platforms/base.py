"""The contract of platforms: all that the rest of `launch` asks one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from distopt.config import RunConfig

from ..findings import Finding
from ..jobs import JobArray, SubmittedJob
from ..plan import Plan


class Platform(ABC):
    r"""One way to start workers: through a launcher such as torchrun, or as a job of a cluster.

    An instance is made without arguments and keeps no state; all that it answers follows from the configuration. It
    first renders a plan, which touches nothing and is what `--dry-run` prints. `distopt launch` then carries the plan
    out itself, or hands the run over to a cluster if the platform has a `job`.

    `check` and `plan` are required. The other members have defaults for a platform that runs the code of this machine
    on hosts that the configuration names, below a `distopt launch` that stays until the run ends.

    What would keep a run from starting is asked in three steps, since `--dry-run` works on a machine that has nothing
    of the platform: `check` reads the configuration, `check_machine` looks for programs and names here, and
    `check_hosts` asks other machines.

    Whatever starts the workers must give each its rank and the world size in variables that `distopt.launchers` lists,
    such as `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`.

    Example:
        A platform of your own, in a module `myplatforms`, is used with `launch.platform: myplatforms:Parallel`:

        >>> import sys
        >>> from distopt.config import parse_config
        >>> from distopt.launch.plan import Command, Plan, env_of_workers, run_files, worker_argv
        >>> class Parallel(Platform):
        ...     def check(self, config):
        ...         if config.launch.hosts:
        ...             yield Finding("launch.hosts", "found hosts, but parallel-run stays here", "remove them")
        ...
        ...     def plan(self, config):
        ...         argv = ["parallel-run", f"--count={config.launch.workers}", *worker_argv(config, sys.executable)]
        ...         return Plan("parallel", (Command(tuple(argv), env_of_workers(config)),), run_files(config))
        >>> config = parse_config("name: demo\nscript: train.py\nlaunch: {workers: 4, hosts: [a]}")
        >>> print(*Parallel().check(config))
        launch.hosts: found hosts, but parallel-run stays here; remove them
        >>> Parallel().plan(config).commands[0].argv[:2]
        ('parallel-run', '--count=4')
    """

    finds_hosts: ClassVar[bool] = False
    """Whether the platform chooses the hosts: `launch.nodes` is their number, and what they have is not checked."""

    @abstractmethod
    def check(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what in the configuration would keep this platform from starting the run, each with its fix.

        What holds on every platform is checked elsewhere (`launch/checks.py`).
        """

    @abstractmethod
    def plan(self, config: RunConfig) -> Plan:
        """Returns the commands and files that start the run."""

    def check_machine(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what this machine lacks to start the run: a program, a package, a name that resolves.

        In a dry run these are warnings.
        """
        return ()

    def check_hosts(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what is wrong on other machines: it may ask hosts and clusters, but changes nothing there.

        It is asked only where nothing else is wrong, and not in a dry run.
        """
        return ()

    def job(self, config: RunConfig) -> SubmittedJob | None:
        """Returns the run as a cluster keeps it, submitted or not; None if `distopt launch` keeps it itself."""
        return None

    def array(self, name: str, prefix: str, runs: Mapping[int, RunConfig], parallel: int) -> JobArray | None:
        """Returns the runs of a sweep as one job of the cluster, not yet submitted; by default None, one job for each.

        It may ask the cluster how many runs such a job may have.

        Args:
            name: What the cluster calls it.
            prefix: Run n has the directory `{prefix}{n:03d}`.
            runs: The runs, by number.
            parallel: How many may run at once.
        """
        return None

    def record_dir(self, config: RunConfig) -> Path:
        """Returns the folder on this machine where `distopt launch` keeps its record of the run."""
        return config.run_dir

    def ranks(self, config: RunConfig) -> range:
        """Returns the numbers that `distopt logs --rank` accepts."""
        return range(config.launch.world_sizes[-1])

    def image(self, config: RunConfig) -> str | None:
        """Returns the name of what holds the workers' code and environment; None if they use this machine's."""
        return None


def check_gpus(config: RunConfig, key: str, gpus: int) -> Iterator[Finding]:
    """Yields that a host, whose GPUs `key` of the YAML counts, has too few of them; 0 is for a run on CPUs."""
    if 0 < gpus < config.launch.workers:
        yield Finding(
            "launch.workers",
            f"{config.launch.workers} on each host, but {key} is {gpus}",
            "each worker needs one",
        )

"""The `launch` section: on which machines, through which launcher, with how many workers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distopt.config.base import Section
from distopt.config.kubernetes import KubernetesConfig
from distopt.config.paths import LocalPath, local_path
from distopt.config.plugins import Reference
from distopt.config.slurm import SlurmConfig
from distopt.config.values import ENV_NAME, SECRET_NAME, HostName, Text

# A line of a hostfile as Open MPI, MPICH and horovodrun write it: `name`, `name:4` or `name slots=4`, where Open MPI
# allows other settings around `slots`.
_HOSTFILE_LINE = re.compile(r"^(?P<host>[^\s:]+)(?::(?P<colon>\d+)|(?:\s+\S+)*?\s+slots=(?P<slots>\d+)(?:\s+\S+)*)?$")


def read_hostfile(path: Path) -> dict[str, int | None]:
    """Returns the hosts of a file with the number of slots of each, None where the file does not say it.

    A line is `name`, `name:4` or `name slots=4`; `#` starts a comment.

    Raises:
        ValueError: The file cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile: {path} cannot be read: {error}") from None

    hosts: dict[str, int | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOSTFILE_LINE.match(text)
        if match is None:
            raise ValueError(f"hostfile: {path}:{number}: found {text!r}, expected `name`, `name:4` or `name slots=4`")
        slots = match["colon"] or match["slots"]
        hosts[match["host"]] = int(slots) if slots else None

    if not hosts:
        raise ValueError(f"hostfile: {path} names no host")
    return hosts


def _read_hostfile_of(launch: dict[str, Any]) -> dict[str, Any]:
    """Returns the `launch` section with the hosts of its hostfile in its place; refuses more processes than slots."""
    try:
        path = local_path(launch["hostfile"])
    except ValueError as error:
        raise ValueError(f"hostfile: {error}") from None
    if launch.get("hosts"):
        raise ValueError("hostfile: found hosts too; give one of them")

    hosts = read_hostfile(Path(path))
    workers = launch.get("workers", 1)
    for host, slots in hosts.items():
        if slots is not None and isinstance(workers, int) and workers > slots and not launch.get("oversubscribe"):
            raise ValueError(
                f"workers: found {workers}, but {host} has {slots} slots in {path}; "
                f"set launch.workers={slots}, or launch.oversubscribe=true to let them share"
            )
    return {**launch, "hosts": list(hosts), "hostfile": None}


class SshConfig(Section):
    """How other hosts are reached; your ssh configuration applies to everything that is not set here."""

    config: LocalPath | None = None
    """Path of an ssh configuration to use in place of yours."""
    known_hosts: LocalPath | None = None
    """Path of the only host keys to trust; null accepts hosts that were never seen before, but no changed key."""
    connect_timeout_s: Annotated[int, Field(ge=1)] = 10
    """Seconds after which a host that does not answer counts as unreachable."""


class LaunchConfig(Section):
    """Where and how the run is started; between machines only `platform` has to change."""

    platform: Literal["local", "torchrun", "horovodrun", "mpirun", "slurm", "kubernetes"] | Reference = "local"
    """What starts the workers: a launcher or cluster, this machine through the launcher that `reduce.backend` needs
    (`local`), or a platform of yours, `module:Name` of a subclass of `distopt.launch.platforms.Platform`."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes per host, at most one for each of its cores."""
    oversubscribe: bool = False
    """Whether a host may get more processes than it has cores."""
    hosts: list[HostName] = Field(default_factory=list)
    """Names or addresses of the hosts; the first one hosts the rendezvous; empty means this machine."""
    hostfile: LocalPath | None = None
    """Path of a file that lists the hosts instead, `name`, `name:4` or `name slots=4` on each line."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Number of hosts if the platform finds them itself (slurm, kubernetes); null is one."""
    min_hosts: Annotated[int, Field(ge=1)] | None = None
    """Minimum number of hosts of an elastic run; null (default) requires all hosts."""
    horovod_controller: Literal["gloo", "mpi"] = "gloo"
    """How horovodrun starts workers and how they coordinate; `mpi` needs a Horovod that was built with MPI."""
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    """Network interface of the workers; null uses the one with the host's address."""
    binding: Literal["numa", "none"] = "numa"
    """Which processor cores a worker may use where a host has several NUMA nodes: those beside its GPU, and without
    one its share of the nodes (`numa`), or all (`none`). What a launcher or a cluster has bound stays so."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of the rendezvous on the first host; null uses a free one on this machine, and 29400 on other hosts."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often the launcher restarts all workers after one has died; they resume from the last checkpoint."""
    max_preemptions: Annotated[int, Field(ge=0)] | None = None
    """How often a cluster may take the run's nodes away before that ends it: requeue the job (Slurm), disrupt its pods
    (Kubernetes, where 0 counts them as restarts). These are no restarts; null is as often as it happens. A `pytorchjob`
    and an `mpijob` count them as restarts, a `trainjob` does what its runtime says."""
    preemption_file: LocalPath | None = None
    """Path of a file whose appearance on a host announces that the host will be taken away, as agents of spot instances
    make it; the run then saves a checkpoint and stops, as after SIGTERM."""
    grace_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that workers have for a last checkpoint after Ctrl-C or SIGTERM before they are killed."""
    env: dict[str, Text] = Field(default_factory=dict)
    """Environment variables of the workers. They are written into plans and run directories, so no secrets here."""
    secrets: list[str] = Field(default_factory=list)
    """Names of environment variables that workers inherit from your environment; their values are written nowhere."""

    ssh: SshConfig = Field(default_factory=SshConfig)
    """How other hosts are reached (torchrun, horovodrun, mpirun)."""
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    """What is requested from Slurm."""
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig)
    """The pods."""

    @property
    def num_hosts(self) -> int:
        """Number of hosts that the run wants."""
        return len(self.hosts) or self.nodes or 1

    @property
    def host_counts(self) -> range:
        """Numbers of hosts that the run may have: one, unless it is elastic."""
        return range(self.min_hosts or self.num_hosts, self.num_hosts + 1)

    @property
    def world_sizes(self) -> range:
        """Numbers of workers that the run may have: one, unless it is elastic."""
        hosts = self.host_counts
        return range(hosts[0] * self.workers, hosts[-1] * self.workers + 1, self.workers)

    @model_validator(mode="before")
    @classmethod
    def _hosts_of_the_hostfile(cls, launch: Any) -> Any:
        has_hostfile = isinstance(launch, dict) and isinstance(launch.get("hostfile"), str)
        return _read_hostfile_of(launch) if has_hostfile else launch

    @model_validator(mode="after")
    def _hosts_agree(self) -> LaunchConfig:
        if len(set(self.hosts)) != len(self.hosts):
            raise ValueError("hosts: a host is named twice; launch.workers is the number of processes on each")
        if self.hosts and self.nodes not in (None, len(self.hosts)):
            raise ValueError(f"nodes: found {self.nodes}, but {len(self.hosts)} hosts are named; remove nodes")
        if self.min_hosts is not None and self.min_hosts > self.num_hosts:
            raise ValueError(
                f"min_hosts: found {self.min_hosts}, expected at most the number of hosts, {self.num_hosts}"
            )
        return self

    @field_validator("env")
    @classmethod
    def _no_secrets_in_env(cls, env: dict[str, str]) -> dict[str, str]:
        for key in env:
            if not ENV_NAME.fullmatch(key):
                raise ValueError(f"{key!r} is not the name of an environment variable")
            if SECRET_NAME.search(key):
                raise ValueError(
                    f"{key} looks like a secret, and env is written into plans and run directories; "
                    f"set it in your environment and name it in launch.secrets: [{key}]"
                )
        return env

    @field_validator("secrets")
    @classmethod
    def _names_only(cls, names: list[str]) -> list[str]:
        for name in names:
            if not ENV_NAME.fullmatch(name):
                raise ValueError("an entry is not the name of an environment variable; values never belong here")
        return names

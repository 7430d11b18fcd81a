"""The `launch` section: on which machines, through which engine, with how many workers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from distopt.config.base import Section
from distopt.config.plugins import Reference

# Hosts from a file, as Open MPI, MPICH and horovodrun write them.


_LINE = re.compile(r"^(?P<host>[^\s:]+)(?::(?P<colon>\d+)|(?:\s+\S+)*?\s+slots=(?P<slots>\d+)(?:\s+\S+)*)?$")


def read_hostfile(path: Path) -> dict[str, int | None]:
    """Returns the hosts of a file with the number of slots of each, None where it is not said.

    A line is `name`, `name:4` or `name slots=4`; `#` starts a comment.

    Raises:
        ValueError: The file cannot be read, or a line is none of these.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"hostfile: {path} cannot be read: {error}") from None
    found: dict[str, int | None] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        match = _LINE.match(text)
        if text and match is None:
            raise ValueError(f"hostfile: {path}:{number}: found {text!r}, expected `name`, `name:4` or `name slots=4`")
        if match is not None:
            slots = match["colon"] or match["slots"]
            found[match["host"]] = int(slots) if slots else None
    if not found:
        raise ValueError(f"hostfile: {path} names no host")
    return found


def with_hosts(launch: dict[str, Any]) -> dict[str, Any]:
    """Returns the `launch` section with the hosts of its hostfile in place of it; refuses more processes than slots."""
    path = launch["hostfile"]
    if launch.get("hosts"):
        raise ValueError("hostfile: found hosts too; give one of them")
    hosts, workers = read_hostfile(Path(path)), launch.get("workers", 1)
    for host, slots in hosts.items():
        if slots is not None and isinstance(workers, int) and workers > slots and not launch.get("oversubscribe"):
            raise ValueError(
                f"workers: found {workers}, but {host} has {slots} slots in {path}; "
                f"set launch.workers={slots}, or launch.oversubscribe=true to let them share"
            )
    return {**launch, "hosts": list(hosts), "hostfile": None}


ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY", re.IGNORECASE)


def _number_as_text(value: Any) -> Any:
    """Lets `OMP_NUM_THREADS: 1` stand without quotes."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


EnvValue = Annotated[str, BeforeValidator(_number_as_text)]


HostName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[:][A-Za-z0-9_.:\]-]*$", max_length=253)]
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:/@=+*-]*$")]


class SshConfig(Section):
    """How the launcher reaches other hosts; your own ssh configuration holds for everything that is not said here."""

    config: str | None = None
    """Path of an ssh configuration to use in place of your own."""
    known_hosts: str | None = None
    """Path of the host keys to trust, and no others; null accepts hosts never seen before, but no changed key."""
    connect_timeout_s: Annotated[int, Field(ge=1)] = 10
    """Seconds after which a host counts as unreachable."""


class SlurmConfig(Section):
    """What Slurm is asked for besides nodes and tasks; null leaves it to the cluster."""

    partition: Word | None = None
    """The partition."""
    account: Word | None = None
    """The account that is charged."""
    qos: Word | None = None
    """The quality of service."""
    time: Annotated[str, Field(pattern=r"^[0-9:-]+$")] | None = None
    """The time limit, as sbatch takes it: minutes, `hours:minutes:seconds` or `days-hours`."""
    memory: Word | None = None
    """Memory per node, such as `16G`."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """Processor cores of each worker."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """Graphics processors of each node."""
    constraint: Word | None = None
    """Features that nodes must have."""
    mpi: Word = "pmix"
    """How srun starts workers of Horovod or MPI: `srun --mpi=…`; `srun --mpi=list` shows what the cluster has."""
    requeue_before_end_s: Annotated[int, Field(ge=10)] = 120
    """Seconds before the time limit or a preemption at which workers save, and the job queues again."""


class VolumeConfig(Section):
    """A claimed volume in every pod."""

    claim: DnsLabel
    """The PersistentVolumeClaim's name."""
    path: Annotated[str, Field(pattern=r"^/[^:]*$")]
    """Where it is mounted."""
    read_only: bool = False
    """Whether pods may only read it."""


class SecretReference(Section):
    """A value in a Kubernetes Secret."""

    secret: DnsLabel
    """The Secret's name."""
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    """The key within it."""


class KubernetesConfig(Section):
    """The pods of a run. Their root file system is read-only and their user has no privileges."""

    kind: Literal["job", "jobset", "trainjob", "pytorchjob", "mpijob"] = "job"
    """The resource: `job` needs no operator, the others JobSet or Kubeflow's trainer, training or MPI operator."""
    image: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]*$")] | None = None
    """The image, with distopt installed; required."""
    namespace: DnsLabel = "default"
    """The namespace."""
    context: str | None = None
    """The context of your kubeconfig; null takes the current one."""
    python: str = "python"
    """The image's Python."""
    cpu: EnvValue = "1"
    """Processor cores of a pod, as Kubernetes writes them."""
    memory: Word = "4Gi"
    """Memory of a pod."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Graphics processors of a pod."""
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = "nvidia.com/gpu"
    """What the cluster calls them."""
    volumes: list[VolumeConfig] = Field(default_factory=list)
    """Volumes for data and for the run directory, which must lie on one that all pods can write."""
    secrets: dict[str, SecretReference] = Field(default_factory=dict)
    """Environment variables of the workers whose values are in Secrets."""
    service_account: DnsLabel | None = None
    """The service account; its token is not mounted."""
    node_selector: dict[str, EnvValue] = Field(default_factory=dict)
    """Labels that nodes must have."""
    queue: DnsLabel | None = None
    """The local queue of Kueue."""
    time_limit_s: Annotated[int, Field(ge=1)] | None = None
    """Seconds after which Kubernetes ends the run."""
    user: Annotated[int, Field(ge=1)] = 1000
    """User and group that pods run as; never root."""
    image_pull_secrets: list[DnsLabel] = Field(default_factory=list)
    """Secrets with which the image is pulled."""
    runtime: DnsLabel = "torch-distributed"
    """The ClusterTrainingRuntime of a `trainjob`."""


class LaunchConfig(Section):
    """Where and how the run is started; `platform` alone changes between machines."""

    platform: Literal["local", "torchrun", "horovodrun", "mpirun", "slurm", "kubernetes"] | Reference = "local"
    """What starts the workers: a launcher or cluster, this machine through the launcher that `reduce.backend` needs
    (`local`), or a platform of yours, `module:Name` of a subclass of `distopt.launch.platforms.Platform`."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes per host, at most one for each of its cores."""
    oversubscribe: bool = False
    """Whether a host may get more processes than it has cores."""
    hosts: list[HostName] = Field(default_factory=list)
    """Names or addresses of the hosts, the first one leading; none means this machine."""
    hostfile: str | None = None
    """Path of a file that names the hosts in their place, `name`, `name:4` or `name slots=4` on each line."""
    nodes: Annotated[int, Field(ge=1)] | None = None
    """Number of hosts, where the platform finds them itself (slurm, kubernetes); null is one."""
    min_hosts: Annotated[int, Field(ge=1)] | None = None
    """Makes the run elastic: it starts with at least this many hosts, and goes on with as many. Null needs them all."""
    horovod_controller: Literal["gloo", "mpi"] = "gloo"
    """What horovodrun starts workers with, and what they agree through; `mpi` needs a Horovod built with it."""
    interface: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,15}$")] | None = None
    """Network interface of the workers; null takes the one that has the host's address."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of the rendezvous on the first host; null takes a free one here, and 29400 on other hosts."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times that the engine starts the workers again after one has died; each time they resume."""
    grace_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that workers get for their last checkpoint after Ctrl-C or SIGTERM before they are killed."""
    env: dict[str, EnvValue] = Field(default_factory=dict)
    """Environment variables of the workers; they are written into plans and run directories, so no secrets here."""
    secrets: list[str] = Field(default_factory=list)
    """Names of environment variables that workers inherit from yours; their values are written nowhere."""

    ssh: SshConfig = Field(default_factory=SshConfig)
    """How other hosts are reached (torchrun, horovodrun, mpirun)."""
    slurm: SlurmConfig = Field(default_factory=SlurmConfig)
    """What Slurm is asked for."""
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig)
    """The pods."""

    @property
    def num_hosts(self) -> int:
        """Number of hosts that the run asks for."""
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
        return with_hosts(launch) if isinstance(launch, dict) and isinstance(launch.get("hostfile"), str) else launch

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
            if not ENV_NAME.match(key):
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
            if not ENV_NAME.match(name):
                raise ValueError("an entry is not the name of an environment variable; values never belong here")
        return names

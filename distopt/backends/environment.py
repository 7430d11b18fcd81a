"""Who started this process: what differs between launchers is a table of variable names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from distopt.backends.base import BackendError


@dataclass(frozen=True)
class Starter:
    """A launcher, and the environment variables by which it tells a process its place."""

    name: str
    markers: tuple[str, ...]  # all of these are set when it started the process
    rank: str
    world_size: str
    local_rank: str | None = None
    local_size: str | None = None
    node_rank: str | None = None


# In the order in which they are asked: a launcher run inside another's job (torchrun under srun, mpirun under sbatch)
# is nearer to the process and comes first.
STARTERS = (
    Starter("torchrun", ("TORCHELASTIC_RUN_ID",), "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    Starter(
        "horovodrun",
        ("HOROVOD_RANK", "HOROVOD_SIZE"),
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK",
        "HOROVOD_LOCAL_SIZE",
        "HOROVOD_CROSS_RANK",
    ),
    # Open MPI's own NODE_RANK counts processes on the node, so the node's number is asked from the others instead.
    Starter(
        "mpirun (Open MPI)",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # The step's own count, not SLURM_NTASKS: a batch script has that one too, and is a single process.
    Starter(
        "srun",
        ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        None,
        "SLURM_NODEID",
    ),
    Starter(
        "mpirun (MPICH)", ("PMI_RANK", "PMI_SIZE"), "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", None
    ),
    Starter("Kubernetes", ("KUBERNETES_SERVICE_HOST", "RANK", "WORLD_SIZE"), "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    Starter("the environment", ("MASTER_ADDR", "RANK", "WORLD_SIZE"), "RANK", "WORLD_SIZE", "LOCAL_RANK"),
)


@dataclass(frozen=True)
class Place:
    """A process's place in its world, as its launcher tells it; None where that launcher does not say."""

    starter: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_size: int | None = None
    node_rank: int | None = None


def find_place(environment: Mapping[str, str] | None = None) -> Place | None:
    """Returns the place that this process's launcher gave it, or None when nobody started it.

    Args:
        environment: Variables to read; those of this process when None.

    Raises:
        BackendError: A launcher's variable is not a number or out of range.

    Example:
        >>> find_place({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}).rank
        1
        >>> find_place({}) is None
        True
    """
    environment = os.environ if environment is None else environment
    for starter in STARTERS:
        if all(marker in environment for marker in starter.markers):
            return _read(starter, environment)
    return None


def _read(starter: Starter, environment: Mapping[str, str]) -> Place:
    def number(variable: str | None) -> int | None:
        text = environment.get(variable) if variable else None
        if text is None:
            return None
        if not text.isdecimal():
            raise BackendError(f"{variable}={text!r} in the environment of {starter.name}: expected a number.")
        return int(text)

    rank, world_size = number(starter.rank), number(starter.world_size)
    if rank is None or world_size is None or not rank < world_size:
        raise BackendError(
            f"{starter.name} says {starter.rank}={environment.get(starter.rank)!r} of "
            f"{starter.world_size}={environment.get(starter.world_size)!r}: expected 0 <= rank < world size."
        )
    return Place(
        starter.name,
        rank,
        world_size,
        number(starter.local_rank),
        number(starter.local_size),
        number(starter.node_rank),
    )


def find_rendezvous(place: Place, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Returns the host and port at which the ranks of a torch.distributed world meet.

    MASTER_ADDR and MASTER_PORT where they are set. Under srun the first node of the step and a port made from the job's
    number; for processes that are all on one machine, the loopback address and a port made from what they have in
    common.

    Raises:
        BackendError: The address is not given and cannot be derived; says which variables to set.
    """
    environment = os.environ if environment is None else environment
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if port is not None and not (port.isdecimal() and 0 < int(port) < 65536):
        raise BackendError(f"MASTER_PORT={port!r}: expected a port number from 1 to 65535.")
    job = environment.get("SLURM_JOB_ID") if place.starter == "srun" else None
    if address is None and job is not None:
        address = first_host(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1")))
    if port is None and job is not None and job.isdecimal():
        # Below the ephemeral ports; the step keeps two steps of a job apart.
        port = str(15000 + (int(job) * 16 + int(environment.get("SLURM_STEP_ID", "0")) % 16) % 15000)
    if address is None or port is None:
        missing = " and ".join(
            name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if value is None
        )
        raise BackendError(
            f"rank {place.rank} of {place.world_size}, started by {place.starter}: {missing} not set, so the ranks do "
            "not know where to meet. Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there, "
            "the same for all ranks."
        )
    return address, int(port)


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list.

    Example:
        >>> first_host("dn[03-07,12],gpu1")
        'dn03'
        >>> first_host("login,dn2")
        'login'
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise BackendError(f"SLURM_STEP_NODELIST={nodelist!r}: expected a list of hosts.")
    return match[1] + (match[2] or "") + (match[3] or "")

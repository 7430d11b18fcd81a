"""What a process is told by whoever started it: its rank, where the ranks meet, and the names that both sides share.

The launcher, the supervisor beside each worker and the worker itself read this one module, so that they agree on the
rank, on the names of environment variables and on the files of a run directory. It imports the standard library alone:
a supervisor starts with every rank, before torch does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# Variables that the launcher sets for host agents, supervisors and workers.
BINDING_VARIABLE = "DISTOPT_BINDING"  # `none` leaves workers on all cores, `cpu` binds them without regard to GPUs
CONFIG_VARIABLE = "DISTOPT_CONFIG"  # the YAML itself, for pods, which share no folder with the launcher
CWD_VARIABLE = "DISTOPT_CWD"  # the folder in which workers run, where ssh would start them in another one
ECHO_VARIABLE = "DISTOPT_ECHO"  # set: supervisors print a worker's output as well, for `kubectl logs`
ERROR_FILE_VARIABLE = "DISTOPT_ERROR_FILE"  # where a worker writes the error that ends it
GRACE_VARIABLE = "DISTOPT_GRACE_S"  # seconds for the last checkpoint
HEARTBEAT_VARIABLE = "DISTOPT_HEARTBEAT"  # set: host agents stop when the launcher is silent
HOSTS_VARIABLE = "DISTOPT_HOSTS"  # the addresses of all hosts, with commas
INTERFACE_VARIABLE = "DISTOPT_INTERFACE"  # the network interface, where the user chose one
SINGLE_DEVICE_VARIABLE = "DISTOPT_SINGLE_DEVICE"  # set: the worker sees one device, which is no other worker's
PREEMPTION_VARIABLE = "DISTOPT_PREEMPTION_FILE"  # the file that announces the end of a host
RUN_DIR_VARIABLE = "DISTOPT_RUN_DIR"  # the run directory, which a supervisor tells its worker
SECRETS_VARIABLE = "DISTOPT_SECRETS"  # the secrets for other hosts, in JSON; never exported to them by this name
STDIN_SECRETS_VARIABLE = "DISTOPT_STDIN_SECRETS"  # set: what starts on another host reads its secrets from stdin
TERMINAL_VARIABLE = "DISTOPT_TERMINAL"  # HOST:DEVICE of the terminal on which rank 0 may draw
WATCH_STOP_VARIABLE = "DISTOPT_WATCH_STOP"  # set: supervisors stop when the stop file appears
WORLD_SIZE_VARIABLE = "DISTOPT_WORLD_SIZE"  # the allowed numbers of workers, as `format_range` writes them

# Variables that users and tests set.
FAILPOINT_VARIABLE = "DISTOPT_FAILPOINT"  # where a save is made to fail (distopt/checkpoint/failpoint.py)
TRUSTED_VARIABLE = "DISTOPT_TRUSTED_TASKS"  # packages, with commas; where set, a YAML may name code of no others

# Files of a run directory.
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.yaml"
FAILURE_FILE = "failure.txt"
LAUNCH_FILE = "launch.json"
LOCK_FILE = "launch.lock"
LOGS = "logs"
METRICS_FILE = "metrics.jsonl"
ROUND_FILE = "round"
RUN_FILE = "run.json"
RUNS = "runs"  # the folder of run directories, by name, unless a run has another `run_dir`
STOP_FILE = "stop"
TRACKERS_FILE = "trackers.json"

USAGE_ERROR = 2
"""Exit status of a worker or a command whose configuration or whose arguments are refused; again, it would be again."""

_MAX_DIGITS = 9  # of a rank or a number of ranks
_MAX_NODES = 100_000
MAX_PORT = 65535
RENDEZVOUS_PORT = 29400
"""The port on the first host at which workers of several hosts meet, unless `launch.port` names another."""


class LauncherError(ValueError):
    """A launcher's variables are missing or make no sense; the message shows them."""


@dataclass(frozen=True)
class LauncherEnv:
    """A launcher, and the environment variables by which it tells a process its rank.

    Attributes:
        name: What messages call it.
        markers: Variables that are all set in a process that it started.
        rank: Variable of the rank.
        world_size: Variable of the number of ranks.
        local_rank: Variable of the rank among those of this host; None where it sets none.
        local_size: Variable of the number of ranks on this host.
        node_rank: Variable of the host's number.
        backend: What `init("auto")` takes in its processes; `mpi` is Horovod where that was built for MPI.
    """

    name: str
    markers: tuple[str, ...]
    rank: str
    world_size: str
    local_rank: str | None = None
    local_size: str | None = None
    node_rank: str | None = None
    backend: Literal["torch_dist", "horovod", "mpi"] = "torch_dist"


# A process inherits the variables of everything around it, and an environment keeps no order. So the table holds one:
# the first launcher that is marked is taken for the one that started this process. What is never run inside of anything
# else comes last, what is usually run inside of others comes first:
#   torchrun     one per node is started by srun, mpirun or a Kubernetes operator, and starts no other launcher
#   horovodrun   runs in batch jobs and pods. With --mpi it calls mpirun, sets no rank itself, and counts as mpirun
#   mpirun       reaches the nodes of a Slurm job by srun: its processes see SLURM_PROCID of mpirun's own daemons,
#                which is one number for all ranks of a node. So both kinds of mpirun come before srun
#   srun         its PMI plugins set PMI_RANK, too, with srun's own numbers. Only Hydra, the mpirun of MPICH and Intel
#                MPI, sets MPI_LOCALRANKID as well, and is told from them by that
#   Ray Train    runs its workers on nodes of Slurm or in pods; what such a worker starts comes before it
#   RANK and WORLD_SIZE are exported by users and operators around any launcher, and are often left over from another
#                run. They count last, and only together with MASTER_ADDR or in a pod
#   SkyPilot     runs a command once on each node, which may start any of the others; else it is one process per node
LAUNCHERS = (
    LauncherEnv(
        "torchrun", ("TORCHELASTIC_RUN_ID",), "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"
    ),
    LauncherEnv(
        "horovodrun",
        ("HOROVOD_RANK", "HOROVOD_SIZE"),
        "HOROVOD_RANK",
        "HOROVOD_SIZE",
        "HOROVOD_LOCAL_RANK",
        "HOROVOD_LOCAL_SIZE",
        "HOROVOD_CROSS_RANK",
        backend="horovod",
    ),
    # Open MPI's NODE_RANK counts processes on the node, so the node's number is asked from the others instead.
    LauncherEnv(
        "mpirun (Open MPI)",
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        backend="mpi",
    ),
    LauncherEnv(
        "mpirun (MPICH)",
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        backend="mpi",
    ),
    # Where `ray start` is a task of srun, or Ray's workers are pods, these have the variables of both.
    LauncherEnv(
        "Ray Train",
        ("RAY_JOB_ID", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "NODE_RANK",
    ),
    # The step's count, not SLURM_NTASKS: a batch script has that one too, and is a single process.
    LauncherEnv(
        "srun",
        ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        None,
        "SLURM_NODEID",
    ),
    LauncherEnv("a PMI launcher", ("PMI_RANK", "PMI_SIZE"), "PMI_RANK", "PMI_SIZE", backend="mpi"),
    LauncherEnv("Kubernetes", ("KUBERNETES_SERVICE_HOST", "RANK", "WORLD_SIZE"), "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    LauncherEnv("the environment", ("MASTER_ADDR", "RANK", "WORLD_SIZE"), "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    LauncherEnv(
        "SkyPilot",
        ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS"),
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_NODES",
        node_rank="SKYPILOT_NODE_RANK",
    ),
)


@dataclass(frozen=True)
class RankInfo:
    """What a launcher tells one process; None where it does not say.

    Attributes:
        launcher: Who started the process, for messages.
        rank: From 0 to `world_size - 1`.
        world_size: Number of processes.
        local_rank: The rank among those of this host.
        local_size: Number of processes on this host.
        node_rank: The host's number.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None = None
    local_size: int | None = None
    node_rank: int | None = None


def find_launcher(environ: Mapping[str, str] | None = None) -> LauncherEnv | None:
    """Returns the launcher that started this process, or None for a process that was started by hand.

    Args:
        environ: Variables to read; those of this process when None.
    """
    environ = os.environ if environ is None else environ
    # A variable that is set to nothing is one that a shell or a template has cleared.
    marked = [launcher for launcher in LAUNCHERS if all(environ.get(marker) for marker in launcher.markers)]
    if not marked:
        return None

    # An interactive shell on a cluster is the one task of an srun (`srun --pty bash`). A world that is set up in it by
    # hand, or by a script that starts processes itself, is nearer than that task.
    if marked[0].name == "srun" and environ[marked[0].world_size] == "1":
        return next((launcher for launcher in marked if launcher.rank == "RANK"), marked[0])
    return marked[0]


def find_rank(environ: Mapping[str, str] | None = None) -> RankInfo | None:
    """Returns the rank that a launcher gave this process, or None for a process that was started by hand.

    Args:
        environ: Variables to read; those of this process when None.

    Raises:
        LauncherError: A variable of the launcher is not a number or out of range.

    Example:
        >>> find_rank({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}).rank
        1
        >>> find_rank({}) is None
        True
    """
    environ = os.environ if environ is None else environ
    launcher = find_launcher(environ)
    if launcher is None:
        _check_cleared(environ)
        return None

    rank = _number(environ, launcher.rank, launcher)
    world_size = _number(environ, launcher.world_size, launcher)
    if rank is None or world_size is None or not rank < world_size:
        raise LauncherError(
            f"{launcher.name} says {launcher.rank}={environ.get(launcher.rank)!r} of "
            f"{launcher.world_size}={environ.get(launcher.world_size)!r}: expected 0 <= rank < world size. If it did "
            f"not start this process, unset {launcher.markers[0]}."
        )

    return RankInfo(
        launcher.name,
        rank,
        world_size,
        _number(environ, launcher.local_rank, launcher),
        _tasks_here(environ) if launcher.name == "srun" else _number(environ, launcher.local_size, launcher),
        _number(environ, launcher.node_rank, launcher),
    )


def has_separate_gpus(rank_info: RankInfo, environ: Mapping[str, str]) -> bool:
    """Returns whether the launcher shows each process GPUs that no other one sees.

    Args:
        rank_info: What it said of the rank.
        environ: The process's variables. Slurm tells its tasks what was asked for: GPUs per task, or a binding.

    Example:
        >>> has_separate_gpus(RankInfo("srun", 1, 2), {"SLURM_GPUS_PER_TASK": "1"})
        True
    """
    if rank_info.launcher != "srun":  # what a task has started shares the GPUs of the task
        return False
    binding = environ.get("SLURM_GPU_BIND", "").removeprefix("verbose,").removeprefix("v,")
    if binding:
        kind, _, numbers = binding.partition(":")
        is_map = kind in ("map", "map_gpu") and "*" not in numbers and len({*numbers.split(",")}) > numbers.count(",")
        return binding == "single:1" or kind == "per_task" or is_map
    return (
        "SLURM_GPUS_PER_TASK" in environ
        or environ.get("SLURM_NTASKS_PER_GPU") == "1"
        or "gres/gpu" in environ.get("SLURM_TRES_PER_TASK", "")
    )


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Returns how many tasks of a step are on this node, of which Slurm gives all nodes' numbers, as in `2(x3),1`."""
    counts: list[int] = []
    for number, repeats in re.findall(r"(\d{1,9})(?:\(x(\d{1,9})\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(number)] * min(int(repeats or 1), _MAX_NODES)
    node = environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and len(node) <= _MAX_DIGITS and int(node) < len(counts) else None


def _number(environ: Mapping[str, str], variable: str | None, launcher: LauncherEnv) -> int | None:
    text = environ.get(variable) if variable else None
    if not text:
        return None
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise LauncherError(
            f"{launcher.name} says {variable}={text[:50]!r}, expected a number. If it did not start this process, "
            f"unset {launcher.markers[0]}."
        )
    return int(text)


def _check_cleared(environ: Mapping[str, str]) -> None:
    """Raises LauncherError for a rank of several beside a variable that is set to nothing, as templates leave it.

    Each such process would take itself for a run of its own, and all would write into one run directory.
    """
    for launcher in LAUNCHERS:
        rank, world_size = environ.get(launcher.rank), environ.get(launcher.world_size)
        is_marked = all(environ.get(marker) for marker in launcher.markers if marker != launcher.rank)
        if is_marked and rank == "" and world_size not in (None, "", "1"):
            raise LauncherError(
                f"{launcher.rank} is set to nothing while {launcher.world_size}={world_size[:50]!r}. Set "
                f"{launcher.rank} to this process's rank; for a process by itself unset {launcher.world_size}."
            )

        cleared = [name for name in (*launcher.markers, launcher.world_size) if environ.get(name) == ""]
        if cleared and rank and rank.isdecimal() and int(rank):
            raise LauncherError(
                f"{cleared[0]} is set to nothing while {launcher.rank}={rank[:50]!r} is not the first of several. Set "
                f"{cleared[0]}; for a process by itself unset {launcher.rank}."
            )


def count_restarts(environ: Mapping[str, str] | None = None) -> int:
    """Returns how often the workers of this run were started before, as torchrun counts it; others do not say.

    Args:
        environ: Variables to read; those of this process when None.

    Example:
        >>> count_restarts({"TORCHELASTIC_RESTART_COUNT": "2"}), count_restarts({})
        (2, 0)
    """
    count = (os.environ if environ is None else environ).get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(count) if count.isdecimal() and len(count) <= _MAX_DIGITS else 0


def find_rendezvous(info: RankInfo, environ: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Returns the host and port at which the ranks of a torch.distributed world meet.

    These are MASTER_ADDR and MASTER_PORT where they are set. Under srun they are else the first node of the step and a
    port that follows from the job's number, under SkyPilot the first node and `RENDEZVOUS_PORT`.

    Args:
        info: This process's rank.
        environ: Variables to read; those of this process when None.

    Raises:
        LauncherError: The address is not given and cannot be derived; says which variables to set.
    """
    environ = os.environ if environ is None else environ
    address = environ.get("MASTER_ADDR") or None
    port = environ.get("MASTER_PORT") or None
    if port is not None and not (port.isdecimal() and len(port) <= _MAX_DIGITS and 0 < int(port) < 65536):
        raise LauncherError(f"MASTER_PORT={port[:50]!r}: expected a port number from 1 to 65535.")

    job = environ.get("SLURM_JOB_ID") if info.launcher == "srun" else None
    if address is None and job is not None:
        address = first_host(environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_NODELIST", "127.0.0.1")))
    if port is None and job is not None and job.isdecimal():
        # Below the ephemeral ports, which start at 32768 on Linux; the step keeps two steps of a job apart.
        step = environ.get("SLURM_STEP_ID", "0")
        port = str(15000 + (int(job) * 16 + (int(step) if step.isdecimal() else 0) % 16) % 15000)

    if info.launcher == "SkyPilot":
        address = address or next(iter(environ["SKYPILOT_NODE_IPS"].split()), None)
        port = port or str(RENDEZVOUS_PORT)

    if address is None or port is None:
        missing = " and ".join(
            name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if value is None
        )
        raise LauncherError(
            f"rank {info.rank} of {info.world_size}, started by {info.launcher}: {missing} not set, so the ranks do "
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
        >>> first_host("rack[2-3]n[08-09]-ib,gpu1")
        'rack2n08-ib'
    """
    match = re.match(r"(?:[^\[\],]|\[\d[^\[\]]*\])+", nodelist)
    if match is None:
        raise LauncherError(f"SLURM_STEP_NODELIST={nodelist!r}: expected a list of hosts.")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def format_range(numbers: range) -> str:
    """Returns the smallest and the largest of some numbers of hosts or workers, as torchrun's `--nnodes` takes them.

    Example:
        >>> format_range(range(2, 9, 2)), format_range(range(3, 4))
        ('2:8', '3')
    """
    return ":".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def parse_range(text: str) -> range:
    """Returns all numbers from the smallest to the largest that `format_range` has written.

    Example:
        >>> parse_range("2:4"), parse_range("3")
        (range(2, 5), range(3, 4))
    """
    smallest, _, largest = text.partition(":")
    return range(int(smallest), int(largest or smallest) + 1)

"""What the ranks of a run do before they train: they build the task and check that all of them have the same."""

from __future__ import annotations

import operator
import socket
from fractions import Fraction
from typing import Any, SupportsIndex

import pyro
import torch

import distopt
from distopt.backends import Backend
from distopt.cgroups import affinity, limit_of_cores
from distopt.config import ConfigError, RunConfig, differences
from distopt.config.plugins import load_reference
from distopt.data import GlobalBatches, ShardBatches
from distopt.rng import seed_all
from distopt.train.components import refused
from distopt.train.source_code import differing_files, source_digests
from distopt.train.task import PeerTaskError, Task, TaskError, load_task

_LOCAL_SECTIONS = ("launch", "log", "run_dir", "serve")  # keys that may differ between ranks


def set_up_process(config: RunConfig, backend: Backend) -> None:
    """Shares the processor's cores among the ranks of this host, and starts from an empty parameter store.

    A number of threads in `launch.env` stands; the variable itself tells nothing, since torchrun sets it, too.

    Cost:
        One `all_gather_json`.
    """
    # torch would use all cores in each process, and the processes would slow each other down.
    affinities = backend.all_gather_json([backend.node_rank, sorted(affinity())])
    here = [set(cpus) for node_rank, cpus in affinities if node_rank == backend.node_rank]
    wanted = config.launch.env.get("OMP_NUM_THREADS", "").split(",")[0]  # OpenMP takes one for each level of nesting
    share = int(wanted) if wanted.strip().isdecimal() else share_of_cores(affinity(), here)
    torch.set_num_threads(max(1, share))

    pyro.clear_param_store()
    seed_all(config.seed)


def share_of_cores(cpus: set[int], of_ranks: list[set[int]]) -> int:
    """Returns how many cores a rank can keep busy where several may run on the same ones, or each on its own.

    Args:
        cpus: The cores that it may run on.
        of_ranks: Those of each rank of its host, itself among them.

    Example:
        >>> share_of_cores({0, 1}, [{0, 1}, {0, 1}]), share_of_cores({0, 1}, [{0, 1}, {2, 3}])
        (1, 2)
    """
    share = sum(Fraction(1, sum(cpu in each for each in of_ranks)) for cpu in cpus)
    everywhere = len(set().union(*of_ranks))
    return min(int(share), limit_of_cores(everywhere) // len(of_ranks))


def device_of_run(config: RunConfig, backend: Backend) -> torch.device:
    """Returns where this rank computes: what `train.device` says, else what the backend has chosen.

    Raises:
        ConfigError: There is no GPU for this rank.
    """
    wanted = config.train.device
    if wanted == "cuda" and backend.device.type != "cuda":
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ConfigError(
            [f"train.device: found cuda, but torch {torch.__version__} sees {num_gpus} GPUs on {socket.gethostname()}"]
        )
    if wanted == "cpu":
        backend.device = torch.device("cpu")
    return backend.device


def load_task_on_all_ranks(config: RunConfig, backend: Backend) -> Task:
    """Builds the task of the configuration on this rank, and checks that all ranks run the same.

    Raises:
        TaskError: A rank could not build it, of which the others raise a `PeerTaskError`, or ranks have different
            configurations, code or versions, which all of them raise.

    Cost:
        One `all_gather_json`.
    """
    task, problem = None, None
    try:
        task = load_task(config.task or "", config.task_args)
        for key, reference in _shared_references(config):
            load_reference(reference, key)
    except (ConfigError, TaskError) as error:
        problem = str(error)

    # Agreed before it is raised: a rank that raised alone would show the others only a closed connection.
    gathered = backend.all_gather_json({"problem": problem, "setup": describe_setup(config)})
    problems = [each["problem"] for each in gathered if each["problem"]]
    if problem is not None:
        raise TaskError(problem)
    if task is None or problems:
        raise PeerTaskError(problems[0])
    check_same_setup([each["setup"] for each in gathered])
    return task


def describe_setup(config: RunConfig) -> dict[str, Any]:
    """Returns what must be equal on all ranks for them to train the same model: configuration, code and versions."""
    modules = [reference.partition(":")[0] for _, reference in _shared_references(config)]
    return {
        "config": config.as_json(exclude=_LOCAL_SECTIONS),
        "code": source_digests(modules),
        "version": {"torch": str(torch.__version__), "pyro": pyro.__version__, "distopt": distopt.__version__},
    }


def _shared_references(config: RunConfig) -> list[tuple[str, str]]:
    """Returns key and `module:Name` of the user's code that runs on all ranks."""
    return [(key, name) for key, name in config.references() if key.partition(".")[0] not in _LOCAL_SECTIONS]


def check_same_setup(setups: list[dict[str, Any]]) -> None:
    """Raises a `TaskError` that shows where the first rank that differs from rank 0 does."""
    code = differing_files([setup["code"] for setup in setups])
    for rank, setup in enumerate(setups):
        lines = [
            f"{key}: {first!r} on rank 0, {other!r} on rank {rank}"
            for key, first, other in differences(setups[0], setup, ignore=["code"])
        ]
        lines += [
            f"module {name}: the file has SHA-256 {values[0]} on rank 0, {values[rank]} on rank {rank}"
            for name, values in code.items()
            if values[rank] != values[0]
        ]
        if lines:
            raise TaskError("\n  ".join(["ranks have different configuration, code or versions:", *lines]))


def make_batches(task: Task, config: RunConfig, backend: Backend) -> GlobalBatches:
    """Decides which rows this rank reads in which step.

    Raises:
        TaskError: `data` does not fit the task; the same on all ranks.
        ConfigError: It does not fit the number of rows.

    Cost:
        One `all_gather_json`.
    """
    num_rows = count_rows(task, backend)
    data, world = config.data, (backend.rank, backend.world_size)
    if data.shard_fraction is not None:
        if not task.sharded:
            raise TaskError(f"data.shard_fraction: {config.task} is not sharded; set it to null, or data.global_batch")
        with refused("data.shard_fraction"):
            return ShardBatches(num_rows, data.shard_fraction, config.seed, *world)

    with refused("data"):
        batches = GlobalBatches(num_rows, data.global_batch, config.seed, *world)
    if task.sharded and not batches.full:
        raise TaskError(
            f"data.global_batch is {batches.global_batch:,}, but {config.task} is sharded, so that every rank "
            "takes all of its rows in each step: set it to null, and data.shard_fraction to take a part of them"
        )
    return batches


def count_rows(task: Task, backend: Backend) -> int:
    """Returns the number of rows of the training set, from which every rank derives the rows that it reads.

    Raises:
        TaskError: Ranks have different numbers of rows; the same on all ranks.

    Cost:
        One `all_gather_json`.
    """
    rows = task.rows()
    counts = backend.all_gather_json(operator.index(rows) if isinstance(rows, SupportsIndex) else repr(rows))
    for rank, count in enumerate(counts):
        if not isinstance(count, int) or count < 1:
            raise TaskError(
                f"task: rows() returned {count} on rank {rank}, expected the number of rows, an int above 0"
            )
        if count != counts[0]:
            raise TaskError(
                f"task: rows() is {counts[0]:,} on rank 0 and {count:,} on rank {rank}; every rank must have the whole "
                "training set; batch() is asked only for the rows of its rank"
            )
    return int(counts[0])

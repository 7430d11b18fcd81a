"""Options of sbatch and srun on which the batch script is built, so that a configuration may not give others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from distopt.config.slurm import SlurmConfig

from ...findings import Finding

_WORKERS = "set launch.workers, the number on each node"
_NODES = "set launch.nodes and launch.min_hosts"
_ENV = "name variables in launch.env or launch.secrets"
_CORES = "set launch.slurm.cpus_per_worker"
_FOLDER = "run the command from that folder"
_REQUEUED = "set launch.max_preemptions=0 for a job that is not requeued"

# What to write in the place of each. A value that contradicts distopt's would have all tasks train in one folder, the
# launchers wait for other nodes than there are, or the job end without a checkpoint.
_OF_BOTH = {
    "nodes": _NODES,
    "ntasks": _WORKERS,
    "ntasks-per-node": _WORKERS,
    "tasks-per-node": _WORKERS,
    "ntasks-per-core": _WORKERS,
    "ntasks-per-gpu": _WORKERS,
    "ntasks-per-socket": _WORKERS,
    "cpus-per-task": _CORES,
    "chdir": _FOLDER,
    "export": _ENV,
    "export-file": _ENV,
    "test-only": "run distopt launch --dry-run",
}
_OF_SBATCH = {
    **_OF_BOTH,
    "array": "run distopt sweep",
    "output": "set run_dir, whose logs/slurm.log it is",
    "open-mode": "remove it: a job that is requeued appends to its log",
    "signal": "set launch.slurm.requeue_before_end_s",
    "no-requeue": _REQUEUED,
    "wrap": "name a script in script, and commands before it in launch.slurm.setup",
    "wait": "run distopt launch without --detach",
}
_SHORT = {"a": "array", "c": "cpus-per-task", "D": "chdir", "n": "ntasks", "N": "nodes", "o": "output", "W": "wait"}

_SHORT_FLAGS = "HkOQsv"  # which take no value, so that others may follow in the same word
_SHORT_WITH_VALUE = "AaBbCcDdeFGiJLMmNnopqStwx"


def check_options(slurm: SlurmConfig) -> Iterator[Finding]:
    """Yields the further options of sbatch and srun that are distopt's, or lack a value."""
    yield from _check("launch.slurm.extra_args", slurm.extra_args, _OF_SBATCH)
    yield from _check("launch.slurm.srun_args", slurm.srun_args, _OF_BOTH)
    container = slurm.container
    if container is not None and container.runtime == "pyxis":
        yield from _check("launch.slurm.container.extra_args", container.extra_args, _OF_BOTH)


def _check(key: str, options: Sequence[str], owned: Mapping[str, str]) -> Iterator[Finding]:
    for index, option in enumerate(options):
        name = _owned_name(option, owned)
        if name is not None:
            yield Finding(f"{key}.{index}", f"found {option}, but distopt sets --{name} itself", owned[name])
        elif re.fullmatch(f"-[{_SHORT_WITH_VALUE}]", option):
            yield Finding(
                f"{key}.{index}", f"found {option} without its value", f"write both as one entry, {option}VALUE"
            )


def _owned_name(option: str, owned: Mapping[str, str]) -> str | None:
    """Returns the long name of an option that is distopt's, None for others; Slurm takes beginnings of names, too."""
    if not option.startswith("--"):
        name = _SHORT.get(option[1:].lstrip(_SHORT_FLAGS)[:1], "")
        return name if name in owned else None
    given = option[2:].partition("=")[0]
    if given in owned:
        return given
    # A beginning that is another option's whole name, such as --no or --ex, is ambiguous and refused by Slurm.
    return next((name for name in owned if len(given) > 2 and name.startswith(given)), None)

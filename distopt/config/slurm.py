"""The `launch.slurm` section: what is requested from Slurm, and what its batch script does first."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from distopt.config.base import Section
from distopt.config.values import AS_TEXT, ArgumentValue, Text


def _with_value(option: str) -> str:
    """Returns an option whose value stands in the same word; Slurm takes an entry with a space for one long name."""
    match = re.fullmatch(r"(--[^\s=]+|-[A-Za-z])\s+(.*)", option)
    if match is None:
        return option
    written = f"{match[1]}={match[2]}" if option.startswith("--") else match[1] + match[2]
    raise ValueError(f"found {option!r}, expected an option and its value in one word: write {written}")


# One line, since each stands on a line of the batch script.
Line = Annotated[Text, Field(pattern=r"^[^\n\r]+$")]
Option = Annotated[Text, Field(pattern=r"^--?[A-Za-z][^\n\r]*$"), AfterValidator(_with_value)]
Mount = Annotated[str, Field(pattern=r"^/[^:,\n\r]*(:/[^:,\n\r]*(:[a-z,]+)?)?$")]
TextArgument = Annotated[ArgumentValue, AS_TEXT]  # an account may be a number
TIME_PATTERN = r"^([0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED|INFINITE)$"
MEMORY_PATTERN = r"^[0-9]+([KMGTkmgt][Bb]?)?$"
NodeList = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*$")]

MailType = Annotated[
    Literal[
        "NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT",
        "TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS",
    ],
    BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value),
]  # fmt: skip


class ContainerConfig(Section):
    """The container in which the workers of each node run; the folder of the command and the run directory are in it.

    `pyxis` is the plugin with options of srun over enroot; `apptainer` is a program on the nodes.
    """

    runtime: Literal["pyxis", "apptainer"]
    """What starts it."""
    image: Annotated[Text, Field(pattern=r"^[^-\s][^\n\r]*$")]
    """The image, as the runtime names it: `nvcr.io#nvidia/pytorch:25.01-py3` or a `.sqsh` file for pyxis, a `.sif` file
    or `docker://…` for apptainer."""
    mounts: list[Mount] = Field(default_factory=list)
    """Folders of the node to mount, `/data`, `/data:/inside` or `/data:/inside:ro`."""
    python: Annotated[str, Field(pattern=r"^[^-\s]\S*$")] = "python3"
    """The image's Python, which has distopt."""
    extra_args: list[Option] = Field(default_factory=list)
    """Further options, of srun for pyxis (`--container-remap-root`), of `apptainer exec` for apptainer (`--rocm`)."""


class SlurmConfig(Section):
    """What is requested from Slurm besides nodes and tasks; null leaves it to the cluster."""

    partition: TextArgument | None = None
    """The partition."""
    account: TextArgument | None = None
    """The account to charge."""
    qos: TextArgument | None = None
    """The quality of service."""
    time: Annotated[Text, Field(pattern=TIME_PATTERN)] | None = None
    """The time limit in sbatch's format: minutes, `hours:minutes:seconds`, `days-hours` or `UNLIMITED`."""
    memory: Annotated[Text, Field(pattern=MEMORY_PATTERN)] | None = None
    """Memory per node, such as `16G`; a number alone is megabytes, and 0 all memory of the node."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """Processor cores of each worker."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each node."""
    gres: TextArgument | None = None
    """Generic resources of each node in place of `gpus_per_node`, such as `gpu:a100:4`."""
    constraint: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\[(][A-Za-z0-9_.,&|*()\[\]-]*$")] | None = None
    """Features that nodes must have, such as `a100&ib`."""
    nodelist: NodeList | None = None
    """Nodes that the job must have, such as `gpu[01-04],fat1`."""
    exclude: NodeList | None = None
    """Nodes that the job must not have."""
    exclusive: bool = False
    """Whether the job shares its nodes with no other job."""
    reservation: TextArgument | None = None
    """The reservation to use."""
    licenses: TextArgument | None = None
    """Licences that the job holds, such as `data:1`."""
    mail_type: list[MailType] = Field(default_factory=list)
    """When the cluster sends mail."""
    mail_user: TextArgument | None = None
    """Who gets it; null is the user who submits."""
    extra_args: list[Option] = Field(default_factory=list)
    """Further options of sbatch, each as one entry: `--comment=flights`. They come last, so that they win; those on
    which the job is built, such as `--nodes` and `--array`, are refused."""
    srun_args: list[Option] = Field(default_factory=list)
    """Further options of the srun that starts the workers, such as `--cpu-bind=cores`; they win as well."""
    setup: list[Line] = Field(default_factory=list)
    """Lines of bash that the batch script runs first, such as `module load cuda`; one that fails ends the job. What
    they export reaches the workers."""
    container: ContainerConfig | None = None
    """The container of the workers; null runs them on the nodes, with the Python of this command."""
    mpi: TextArgument = "pmix"
    """How srun starts workers of Horovod or MPI, `srun --mpi=…`; `srun --mpi=list` shows what the cluster supports."""
    requeue_before_end_s: Annotated[int, Field(ge=10, le=65535)] = 120
    """Seconds before the time limit or a preemption at which workers save a checkpoint and the job is requeued."""

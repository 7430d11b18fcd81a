"""What horovodrun and mpirun have in common: where their programs are, and what they are told by the environment."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from distopt.config import RunConfig
from distopt.config.launch import SECRET_NAME

from .. import ssh


def find_mpirun() -> str | None:
    """Returns the mpirun of this Python's environment, else the system's."""
    own = beside_python("mpirun")
    return str(own) if own.exists() else shutil.which("mpirun")


@cache
def is_mpich(program: str) -> bool:
    """Whether an mpirun is MPICH's (Hydra), which has other flags than Open MPI's."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    except OSError:
        return False
    return "HYDRA" in said or "MPICH" in said


def open_mpi_env(config: RunConfig) -> dict[str, str]:
    """Returns the variables that Open MPI 4 and 5 read: how it reaches hosts, and that it may run as root."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    if not config.launch.hosts:
        return {**root, "OMPI_MCA_btl": "^tcp"}  # shared memory does, and nothing listens
    agent = str((config.run_dir / ssh.FOLDER / "ssh").resolve())
    interface = config.launch.interface
    return {
        **root,
        "PRTE_MCA_plm_ssh_agent": agent,
        "OMPI_MCA_plm_rsh_agent": agent,
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
        **({"OMPI_MCA_btl_tcp_if_include": interface} if interface else {}),
    }


def beside_python(program: str) -> Path:
    """Returns where a program of this Python's environment is; it need not exist."""
    return Path(sys.executable).with_name(program)


def secret_variables(config: RunConfig) -> frozenset[str]:
    """Returns the names of variables that an engine must not put on command lines."""
    return frozenset(name for name in os.environ if SECRET_NAME.search(name)) | set(config.launch.secrets)


# Which MPI Horovod was built for, read from its binary, since importing it takes seconds and could abort.


# The names under which the two families of MPI keep their library compatible.
_FAMILIES: tuple[tuple[bytes, Literal["Open MPI", "MPICH"]], ...] = (
    (b"\0libmpi.so.40\0", "Open MPI"),
    (b"\0libmpi.so.12\0", "MPICH"),
)

BUILD_HOROVOD = "tools/build_horovod.py"
Mpi = Literal["Open MPI", "MPICH", "none"]


def mpi_of_horovod() -> Mpi | None:
    """Returns the MPI that Horovod's library needs, `none` where it was built without, None without Horovod."""
    spec = find_spec("horovod")
    if spec is None or not spec.submodule_search_locations:
        return None
    for folder in spec.submodule_search_locations:
        for library in Path(folder, "torch").glob("mpi_lib_v2*.so"):
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
                return next((family for name, family in _FAMILIES if binary.find(name) >= 0), "none")
    return None

"""What horovodrun and mpirun share: which MPI is here, which one Horovod was built for, what the environment says."""

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
from distopt.config.values import SECRET_NAME

from .. import ssh

BUILD_HOROVOD = "tools/build_horovod.py"

MpiFamily = Literal["Open MPI", "MPICH"]

# The file names under which the two families keep their library compatible, as a binary that needs it has them.
_LIBRARIES: tuple[tuple[bytes, MpiFamily], ...] = (
    (b"\0libmpi.so.40\0", "Open MPI"),
    (b"\0libmpi.so.12\0", "MPICH"),
)


def find_mpirun() -> str | None:
    """Returns the mpirun of this Python's environment, else the system's; None if there is none."""
    program = Path(sys.executable).with_name("mpirun")
    return str(program) if program.exists() else shutil.which("mpirun")


@cache
def is_mpich(program: str) -> bool:
    """Returns whether an mpirun is MPICH's (Hydra), which has other flags than Open MPI's."""
    try:
        version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    except OSError:
        return False
    return "HYDRA" in version or "MPICH" in version


def mpi_of_horovod() -> MpiFamily | Literal["none"] | None:
    """Returns the MPI that Horovod was built for, `none` if it was built without one, None without Horovod.

    Its binary is read, since importing Horovod takes seconds, and aborts the process where its MPI is not the one that
    started it.
    """
    spec = find_spec("horovod")
    if spec is None or not spec.submodule_search_locations:
        return None

    for folder in spec.submodule_search_locations:
        for library in Path(folder, "torch").glob("mpi_lib_v2*.so"):
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as binary:
                return next((family for name, family in _LIBRARIES if binary.find(name) >= 0), "none")
    return None


def open_mpi_env(config: RunConfig) -> dict[str, str]:
    """Returns the variables that Open MPI 4 and 5 read: how it reaches hosts, and that it may run as root.

    Open MPI 5 reads `PRTE_MCA_…` where 4 reads `OMPI_MCA_…`; each ignores the other's.
    """
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    if not config.launch.hosts:
        return {**root, "OMPI_MCA_btl": "^tcp"}  # shared memory is enough here, and then nothing listens

    agent = str((config.run_dir / ssh.FOLDER / "ssh").resolve())
    interface = config.launch.interface
    return {
        **root,
        "PRTE_MCA_plm_ssh_agent": agent,
        "OMPI_MCA_plm_rsh_agent": agent,
        # All hosts are reached from here, whose ssh has the options of the run.
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
        **({"OMPI_MCA_btl_tcp_if_include": interface} if interface else {}),
    }


def secret_variables(config: RunConfig) -> frozenset[str]:
    """Returns the names of variables that a launcher must not get, since it puts its environment on command lines."""
    return frozenset(name for name in os.environ if SECRET_NAME.search(name)) | set(config.launch.secrets)

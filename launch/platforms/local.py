"""This machine, through the launcher that the backend belongs to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from distopt.config import RunConfig

from ..findings import Finding
from ..plan import Command, Plan, env_of_workers, run_files, worker_argv
from .base import Platform


class LocalPlatform(Platform):
    """Starts all workers on this machine, and lets them listen on the loopback interface alone where it can."""

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what keeps the backend's launcher from starting the run here."""
        if config.launch.hosts:
            yield Finding(
                "launch.hosts",
                "found hosts, but launch.platform is local, which is this machine",
                "set launch.platform to torchrun or horovodrun, or remove the hosts",
            )
        if config.reduce.backend == "single" and config.launch.workers != 1:
            yield Finding(
                "launch.workers",
                f"found {config.launch.workers}, but reduce.backend is single, a world of one worker",
                "set launch.workers=1 or reduce.backend=auto",
            )

        launcher = self._launcher(config)
        if launcher is not None:
            yield from launcher.check(config)

    def check_machine(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what this machine lacks for the backend's launcher."""
        launcher = self._launcher(config)
        return () if launcher is None else launcher.check_machine(config)

    def plan(self, config: RunConfig) -> Plan:
        """Renders torchrun, horovodrun, mpirun, or one Python process for a world of one."""
        launcher = self._launcher(config)
        if launcher is not None:
            return launcher.plan(config)

        worker = Command(tuple(worker_argv(config, sys.executable)), env_of_workers(config))
        return Plan("local", (worker,), run_files(config))

    def _launcher(self, config: RunConfig) -> Platform | None:
        from . import horovodrun, mpirun, torchrun  # one of them is needed, and none for a world of one

        match config.reduce.backend:
            case "single":
                return None
            case "horovod":
                return horovodrun.HorovodrunPlatform()
            case "mpi":
                return mpirun.MpirunPlatform()
            case _:
                return torchrun.TorchrunPlatform()

"""This machine, through the engine that the backend belongs to."""

from __future__ import annotations

import sys

from distopt.config import RunConfig

from ..plan import Command, Plan, env_of_workers, run_files, worker_argv
from .base import Platform


class LocalPlatform(Platform):
    """Starts all workers on this machine; nothing listens beyond the loopback interface that need not."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps the backend's engine from starting here."""
        problems = []
        if config.launch.hosts:
            problems.append(
                "launch.hosts: found hosts, but launch.platform is local, which is this machine; "
                "set launch.platform to torchrun or horovodrun, or remove the hosts"
            )
        if config.reduce.backend == "single" and config.launch.workers != 1:
            problems.append(
                f"launch.workers: found {config.launch.workers}, but reduce.backend is single, a world of one worker; "
                "set launch.workers=1 or reduce.backend=auto"
            )
        engine = self._engine(config)
        return problems + (engine.problems(config) if engine else [])

    def plan(self, config: RunConfig) -> Plan:
        """Renders torchrun, horovodrun, or a lone Python process."""
        engine = self._engine(config)
        if engine:
            return engine.plan(config)
        return Plan(
            "local",
            (Command(tuple(worker_argv(config, sys.executable)), env_of_workers(config)),),
            run_files(config),
        )

    def _engine(self, config: RunConfig) -> Platform | None:
        from . import horovodrun, mpirun, torchrun

        match config.reduce.backend:
            case "single":
                return None
            case "horovod":
                return horovodrun.HorovodrunPlatform()
            case "mpi":
                return mpirun.MpirunPlatform()
            case _:
                return torchrun.TorchrunPlatform()

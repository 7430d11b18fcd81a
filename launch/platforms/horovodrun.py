"""horovodrun, Horovod's launcher, with its Gloo controller."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from distopt.config import RunConfig
from distopt.config.platforms import SECRET_NAME

from ..plan import Command, Plan, env_of_workers, run_files, worker_argv


class Platform:
    """horovodrun on this machine."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps horovodrun from starting here."""
        problems = []
        if config.reduce.backend not in ("auto", "horovod"):
            problems.append(
                f"reduce.backend: found {config.reduce.backend}, but horovodrun starts workers of horovod; "
                "set reduce.backend=auto or another launch.platform"
            )
        if find_spec("horovod") is None or not horovodrun().exists():
            problems.append(
                "reduce.backend: Horovod was chosen, and it is not installed for "
                f"{sys.executable}; `make setup-dev` in a checkout of distopt builds it for the installed torch, "
                "or set reduce.backend=torch_dist"
            )
        return problems

    def plan(self, config: RunConfig) -> Plan:
        """Renders one horovodrun over the loopback interface.

        horovodrun puts the whole environment on command lines, so what looks like a secret is kept from it, and guards
        read it from a file of mode 0600 instead.
        """
        launch = config.launch
        argv = [
            str(horovodrun()),
            "--gloo",
            *("--network-interfaces", "lo"),
            *("-np", str(launch.workers)),
            *("-H", f"localhost:{launch.workers}"),
            *worker_argv(config, sys.executable),
        ]
        hidden = frozenset(name for name in os.environ if SECRET_NAME.search(name)) | set(launch.secrets)
        return Plan(
            "horovodrun",
            (Command(tuple(argv), env_of_workers(config, [launch.workers]), hidden),),
            run_files(config),
            stop_by_file=True,  # horovodrun kills workers 5 s after a signal, perhaps in the middle of a checkpoint
        )

    def world_sizes(self, config: RunConfig) -> range:
        """Returns the one number of workers."""
        return range(config.launch.workers, config.launch.workers + 1)


def horovodrun() -> Path:
    """Returns where this Python's horovodrun is; it need not exist."""
    return Path(sys.executable).with_name("horovodrun")

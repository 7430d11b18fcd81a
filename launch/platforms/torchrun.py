"""torchrun, PyTorch's launcher: one on each host; it starts workers, and restarts them all when one dies."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

from distopt.config import RunConfig
from distopt.launchers import HEARTBEAT_VARIABLE, RENDEZVOUS_PORT, format_range

from .. import ssh
from ..findings import Finding
from ..plan import Command, Plan, env_of_workers, run_files, worker_argv
from ..worker import network
from .base import Platform

# With one store for all restarts, new workers read the addresses of dead ones: half of the restarts of torch 2.13 on
# one node failed, and none with a store per restart.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

RENDEZVOUS_FILE = "rendezvous"

# The keep-alive is rare because each one makes the file longer.
FILE_STORE = "--rdzv-conf=store_type=file,keep_alive_interval=60"

SHUTDOWN_TIMEOUT_SINCE = (2, 12)
OLD_SHUTDOWN_TIMEOUT_S = 30
"""After so many seconds torchrun of older releases kills its workers, whatever the grace time."""


class TorchrunPlatform(Platform):
    """torchrun on this machine, or on each of several hosts, which are reached by ssh."""

    def check(self, config: RunConfig) -> Iterator[Finding]:
        """Yields what keeps torchrun from being the launcher."""
        if config.reduce.backend in ("horovod", "mpi"):
            yield Finding(
                "reduce.backend",
                f"found {config.reduce.backend}, but torchrun starts workers of torch_dist",
                "set reduce.backend=auto or another launch.platform",
            )
        if config.launch.grace_s > OLD_SHUTDOWN_TIMEOUT_S and not torchrun_has_shutdown_timeout():
            yield Finding(
                "launch.grace_s",
                f"found {config.launch.grace_s:g}, but torchrun of torch {version('torch')} kills workers "
                f"{OLD_SHUTDOWN_TIMEOUT_S} s after a signal",
                f"install torch {'.'.join(map(str, SHUTDOWN_TIMEOUT_SINCE))}, or set launch.platform=local",
                severity="warning",
            )

    def check_machine(self, config: RunConfig) -> Iterable[Finding]:
        """Returns the hosts whose names are wrong here."""
        return ssh.check_host_names(config)

    def check_hosts(self, config: RunConfig) -> Iterable[Finding]:
        """Returns what ssh finds on the hosts."""
        return ssh.check_hosts(config)

    def plan(self, config: RunConfig) -> Plan:
        """Renders one torchrun on the loopback interface, or one on each host; the first one hosts the rendezvous."""
        launch = config.launch
        if launch.hosts:
            commands = tuple(self._on_host(config, index) for index in range(len(launch.hosts)))
            return Plan("torchrun", commands, run_files(config), heartbeat=True, min_hosts=launch.min_hosts)

        files = run_files(config)
        if launch.port is not None:
            rendezvous = _rendezvous("127.0.0.1", launch.port, 0)
        else:
            # A file, since a rendezvous over TCP listens on all interfaces and unpickles what it is sent.
            path = config.run_dir / RENDEZVOUS_FILE
            files[path] = ""
            rendezvous = ["--rdzv-backend=c10d", FILE_STORE, f"--rdzv-endpoint={path.resolve()}"]

        argv = torchrun_argv(config, [*rendezvous, f"--rdzv-id={config.name}", "--local-addr=127.0.0.1"])
        env = env_of_workers(config, **FRESH_STORE, GLOO_SOCKET_IFNAME="lo")
        return Plan("torchrun", (Command(tuple(argv), env),), files)

    def _on_host(self, config: RunConfig, index: int) -> Command:
        launch = config.launch
        host = launch.hosts[index]
        addresses = [network.resolve(name) or name for name in launch.hosts]

        rendezvous = [
            f"--nnodes={format_range(launch.host_counts)}",
            *_rendezvous(addresses[0], launch.port or RENDEZVOUS_PORT, index),
            f"--rdzv-id={config.name}",
            f"--local-addr={addresses[index]}",
        ]
        torchrun = torchrun_argv(config, rendezvous)
        agent = [sys.executable, "-m", "distopt.launch.worker.host_agent", "--", *torchrun]
        env = env_of_workers(config, **FRESH_STORE, **{HEARTBEAT_VARIABLE: "1"})
        if network.is_here(host):
            return Command(tuple(agent), env, frozenset(launch.secrets), host)

        # ssh passes on no environment and starts in the home folder, so both are on the command line.
        argv = ["env", "-C", os.getcwd(), *(f"{key}={value}" for key, value in sorted(env.items())), *agent]
        return Command(tuple(ssh.remote(config, host, argv)), {}, frozenset(launch.secrets), host)


def torchrun_argv(
    config: RunConfig, rendezvous: list[str], worker: list[str] | None = None, python: str = sys.executable
) -> list[str]:
    """Returns torchrun's command line.

    Args:
        config: The run.
        rendezvous: How the hosts meet, in torchrun's options.
        worker: The command of each worker; by default one on this machine.
        python: The interpreter that torchrun is run by.
    """
    launch = config.launch
    return [
        *(python, "-m", "torch.distributed.run"),
        *rendezvous,
        f"--nproc-per-node={launch.workers}",
        f"--max-restarts={launch.max_restarts}",
        *_shutdown_timeout(launch.grace_s),
        "--no-python",
        "--",
        *(worker or worker_argv(config, python)),
    ]


def _shutdown_timeout(grace_s: float) -> list[str]:
    """Returns torchrun's option for when it kills what is still there; older ones have none, and kill after 30 s."""
    if not torchrun_has_shutdown_timeout():
        return []
    # After the grace time, so that supervisors kill what is late and write it down before torchrun kills them.
    return [f"--shutdown-timeout={round(grace_s) + 5}"]


def torchrun_has_shutdown_timeout() -> bool:
    """Returns whether the installed torch's launcher can be told how long to wait; where there is none, a new one."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return True
    return (int(major), int(minor)) >= SHUTDOWN_TIMEOUT_SINCE


def _rendezvous(address: str, port: int, index: int) -> list[str]:
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-conf=is_host={int(index == 0)}"]

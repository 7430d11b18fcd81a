"""torchrun, PyTorch's own launcher: one on each host; starts workers, restarts them all when one dies."""

from __future__ import annotations

import os
import sys

from distopt.config import RunConfig
from distopt.launchers import HEARTBEAT_VARIABLE, RENDEZVOUS_PORT, format_range

from .. import ssh
from ..plan import Command, Plan, env_of_workers, run_files, worker_argv
from ..worker import network
from .base import Platform

# With the agent's store shared over restarts, new workers read the addresses of dead ones: half of the restarts of
# torch 2.13 on one node failed, and none with a store per restart.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
RENDEZVOUS_FILE = "rendezvous"
FILE_STORE = "--rdzv-conf=store_type=file,keep_alive_interval=60"  # each sign of life makes the file longer


class TorchrunPlatform(Platform):
    """torchrun on this machine, or on each of several hosts, reached by ssh."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps torchrun from starting."""
        hosts = config.launch.hosts
        problems = []
        if config.reduce.backend in ("horovod", "mpi"):
            problems.append(
                f"reduce.backend: found {config.reduce.backend}, but torchrun starts workers of torch_dist; "
                "set reduce.backend=auto or another launch.platform"
            )
        if unresolved := ssh.host_problems(hosts):
            return problems + unresolved
        return problems + ssh.unreachable(config, [host for host in hosts if not network.is_here(host)])

    def plan(self, config: RunConfig) -> Plan:
        """Renders one torchrun on the loopback interface, or one on each host, the first one holding the rendezvous."""
        launch = config.launch
        if launch.hosts:
            commands = tuple(self._on_host(config, index) for index in range(len(launch.hosts)))
            return Plan("torchrun", commands, run_files(config), heartbeat=True, least=launch.min_hosts)
        # A file, since a rendezvous over TCP listens on all interfaces and unpickles what it is sent.
        meeting = config.run_dir / RENDEZVOUS_FILE
        files = {**run_files(config), meeting: ""}
        place = ["--rdzv-backend=c10d", FILE_STORE, f"--rdzv-endpoint={meeting.resolve()}"]
        if launch.port is not None:
            place, files = _rendezvous("127.0.0.1", launch.port, 0), run_files(config)
        argv = torchrun_argv(config, [*place, f"--rdzv-id={config.name}", "--local-addr=127.0.0.1"])
        env = env_of_workers(config, **FRESH_STORE, GLOO_SOCKET_IFNAME="lo")
        return Plan("torchrun", (Command(tuple(argv), env),), files)

    def _on_host(self, config: RunConfig, index: int) -> Command:
        launch = config.launch
        host = launch.hosts[index]
        addresses = [network.resolve(name) or name for name in launch.hosts]
        place = [
            f"--nnodes={format_range(launch.host_counts)}",
            *_rendezvous(addresses[0], launch.port or RENDEZVOUS_PORT, index),
        ]
        engine = torchrun_argv(config, [*place, f"--rdzv-id={config.name}", f"--local-addr={addresses[index]}"])
        agent = [sys.executable, "-m", "distopt.launch.worker.host_agent", "--", *engine]
        env = env_of_workers(config, **FRESH_STORE, **{HEARTBEAT_VARIABLE: "1"})
        if network.is_here(host):
            return Command(tuple(agent), env, host=host)
        words = ["env", "-C", os.getcwd(), *(f"{key}={value}" for key, value in sorted(env.items())), *agent]
        return Command(tuple(ssh.remote(config, host, words)), host=host)


def torchrun_argv(
    config: RunConfig, place: list[str], worker: list[str] | None = None, python: str = sys.executable
) -> list[str]:
    """Returns torchrun's command line.

    Args:
        config: The run.
        place: The options that differ between hosts.
        worker: The command of each worker; by default one on this machine.
        python: The interpreter that torchrun is run by.
    """
    launch = config.launch
    return [
        *(python, "-m", "torch.distributed.run"),
        *place,
        f"--nproc-per-node={launch.workers}",
        f"--max-restarts={launch.max_restarts}",
        f"--shutdown-timeout={round(launch.grace_s) + 5}",  # guards kill what is late, and write it down
        "--no-python",
        "--",
        *(worker or worker_argv(config, python)),
    ]


def _rendezvous(address: str, port: int, index: int) -> list[str]:
    return ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}", f"--rdzv-conf=is_host={int(index == 0)}"]

"""torchrun, PyTorch's own launcher: starts workers, restarts them all when one dies."""

from __future__ import annotations

import sys

from distopt.config import RunConfig

from ..plan import Command, Plan, env_of_workers, run_files, worker_argv

# With the agent's store shared over restarts, new workers read the addresses of dead ones: half of the restarts of
# torch 2.13 on one node failed, and none with a store per restart.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Platform:
    """torchrun on this machine."""

    def problems(self, config: RunConfig) -> list[str]:
        """Returns what keeps torchrun from starting here."""
        if config.reduce.backend in ("horovod", "mpi"):
            return [
                f"reduce.backend: found {config.reduce.backend}, but torchrun starts workers of torch_dist; "
                "set reduce.backend=auto or another launch.platform"
            ]
        return []

    def plan(self, config: RunConfig) -> Plan:
        """Renders one torchrun whose rendezvous stays on the loopback interface."""
        launch = config.launch
        argv = [
            *(sys.executable, "-m", "torch.distributed.run"),
            *(["--standalone"] if launch.port is None else _rendezvous(launch.port)),
            f"--nproc-per-node={launch.workers}",
            f"--max-restarts={launch.max_restarts}",
            f"--shutdown-timeout={round(launch.grace_s) + 5}",  # guards kill what is late, and write it down
            "--local-addr=127.0.0.1",
            "--no-python",
            "--",
            *worker_argv(config, sys.executable),
        ]
        env = env_of_workers(config, [launch.workers], **FRESH_STORE, GLOO_SOCKET_IFNAME="lo")
        return Plan("torchrun", (Command(tuple(argv), env),), run_files(config))

    def world_sizes(self, config: RunConfig) -> range:
        """Returns the one number of workers."""
        return range(config.launch.workers, config.launch.workers + 1)


def _rendezvous(port: int) -> list[str]:
    return ["--nnodes=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-conf=is_host=1"]

"""A platform: workers are started as plain processes of this machine, without a launcher's program."""

import sys

from distopt.launch.findings import Finding
from distopt.launch.plan import Command, Plan, env_of_workers, run_files, worker_argv
from distopt.launch.platforms import Platform


class PlainProcesses(Platform):
    """Starts one process per worker, and tells each its rank and the address of rank 0."""

    def check(self, config):
        if config.launch.port is None:
            yield Finding("launch.port", "found null, but plain processes meet at a port", "set it to a free one")

    def plan(self, config):
        return Plan("plain", tuple(self._worker(config, rank) for rank in self.ranks(config)), run_files(config))

    def _worker(self, config, rank):
        variables = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(config.launch.port),
            "WORLD_SIZE": str(config.launch.workers),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return Command(tuple(worker_argv(config, sys.executable)), env_of_workers(config, **variables))

"""horovodrun as `distopt launch` runs it: `python -m MODULE [OPTIONS] -- …`.

With `--address`, it listens there: horovodrun's servers ask for no password and listen on every interface. With
`--elastic`, supervisors learn of the rounds of a changing world (`elastic.py`), and a lost host joins again as soon as
it answers over ssh. Plain Horovod re-admits a host after a cooldown, reachable or not, and notifies only scripts that
use `hvd.elastic.run`. With `--hidden`, these variables stand on no command line, and with `--secrets` the run's ssh
hands them to other hosts on standard input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distopt.launchers import SECRETS_VARIABLE, STDIN_SECRETS_VARIABLE

from . import elastic, network

RETRY_S = 5.0
SSH_TIMEOUT_S = 30.0
_bind = socketserver.TCPServer.server_bind


def main(argv: Sequence[str]) -> int:
    """Runs horovodrun with the arguments behind `--`."""
    split = argv.index("--")  # the first: the workers' command may have more
    parser = argparse.ArgumentParser(prog="horovod_driver", allow_abbrev=False)
    parser.add_argument("--address")
    parser.add_argument("--elastic", type=Path)
    parser.add_argument("--hidden", type=lambda names: names.split(","), default=[])
    parser.add_argument("--secrets", type=lambda names: names.split(","), default=[])
    options = parser.parse_args(argv[:split])

    from horovod.runner import gloo_run
    from horovod.runner.launch import run_commandline

    if options.address:
        _listen_on(options.address)
    if options.elastic:
        gloo_run.ElasticDriver = driver_class(options.elastic)
    _hide([*options.hidden, SECRETS_VARIABLE])
    if options.secrets:
        os.environ[SECRETS_VARIABLE] = json.dumps({name: os.environ[name] for name in options.secrets})
        os.environ[STDIN_SECRETS_VARIABLE] = "1"
    sys.argv = ["horovodrun", *argv[split + 1 :]]
    return int(run_commandline() or 0)


def _hide(names: Sequence[str]) -> None:
    """Keeps variables from the command lines on which horovodrun exports its environment; its children inherit them."""
    from horovod.runner.common.util import env

    is_exportable = env.is_exportable
    env.is_exportable = lambda name: name not in names and is_exportable(name)


def _listen_on(address: str) -> None:
    """Has servers that would be bound to all interfaces bound to one address."""

    def bind(server: socketserver.TCPServer) -> None:
        host, port = server.server_address[:2]
        server.server_address = (address if host in ("", "0.0.0.0") else host, port)
        _bind(server)

    socketserver.TCPServer.server_bind = bind  # type: ignore[assignment, method-assign]


def driver_class(run_dir: Path) -> type:
    """Returns Horovod's driver of elastic worlds, with supervisors in the role of `hvd.elastic.run`.

    Args:
        run_dir: Where supervisors read the rounds.
    """
    from horovod.runner.elastic.driver import ElasticDriver
    from horovod.runner.elastic.worker import HostUpdateResult

    class Driver(ElasticDriver):  # type: ignore[misc]
        """Gives out ranks in rounds; each round is recorded before any worker learns of its rank."""

        def __init__(self, rendezvous: Any, discovery: Any, *args: Any, **options: Any) -> None:
            reachable = ReachableHosts(discovery.find_available_hosts_and_slots, self._is_lost)
            super().__init__(rendezvous, reachable, *args, **options)

        def _is_lost(self, host: str) -> bool:
            return bool(self._host_manager.is_blacklisted(host))

        def _start_worker_processes(self, pending_slots: Any) -> None:
            elastic.begin_round(run_dir, self._worker_registry.last_rendezvous())
            _print(f"{self.world_size()} workers on {', '.join(self.host_assignments)}")
            super()._start_worker_processes(pending_slots)

        def get_worker_client(self, slot_info: Any) -> Driver:
            """Returns what the driver notifies of hosts that come or go: itself, since workers do not listen."""
            return self

        def notify_hosts_updated(self, timestamp: int, update: int) -> None:
            """Ends the round when a host has come back; one that goes ends it by the death of its workers."""
            if update & HostUpdateResult.added:
                _print("a lost host is back: the workers save a checkpoint and restart with it")
                self._worker_registry._reset_count -= 1  # the limit is one of deaths
                elastic.end_round(run_dir, self._worker_registry.last_rendezvous())

    return Driver


@dataclasses.dataclass
class _Loss:
    """One loss of a host: what it answered since then, and when to ask it again (of the monotonic clock)."""

    answered: bool = False
    ask_at: float = 0.0


class ReachableHosts:
    """The hosts of a run without those that were lost and do not answer; what Horovod's driver asks for hosts.

    Args:
        find: Returns the slots of each host of the run.
        is_lost: Whether a host's workers have failed, so that the host must answer before it is used again.
    """

    def __init__(self, find: Callable[[], dict[str, int]], is_lost: Callable[[str], bool]) -> None:
        self._find = find
        self._is_lost = is_lost
        self._losses: dict[str, _Loss] = {}

    def find_available_hosts_and_slots(self) -> dict[str, int]:
        """Returns the slots of each host; at once, since the driver holds a lock meanwhile."""
        return {host: slots for host, slots in self._find().items() if self._is_available(host)}

    def _is_available(self, host: str) -> bool:
        if not self._is_lost(host):
            self._losses.pop(host, None)
            return True
        return network.is_here(host) or self._answers(host)

    def _answers(self, host: str) -> bool:
        """Whether the host answered when it was last asked; a thread asks it again when that is due."""
        if host not in self._losses:
            _print(f"{host} was lost; it joins again when it answers")
        loss = self._losses.setdefault(host, _Loss())
        if time.monotonic() >= loss.ask_at:
            loss.ask_at = time.monotonic() + SSH_TIMEOUT_S + 1
            threading.Thread(target=_ask, args=(host, loss), name=f"{host} asked", daemon=True).start()
        return loss.answered


def _ask(host: str, loss: _Loss) -> None:
    """Asks a host over ssh; its answer is one to this loss, also where it comes after the next one."""
    argv = ["ssh", "-T", "--", host, "true"]  # the run's own ssh, which is first on PATH
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=SSH_TIMEOUT_S)
        loss.answered = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        loss.answered = False
    loss.ask_at = time.monotonic() + RETRY_S


def _print(text: str) -> None:
    """Prints a line that `distopt launch` repeats on the user's terminal."""
    print(f"distopt: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Stands on each host between ssh and an engine: `python -m MODULE [--meet NAME:PORT] -- ENGINE…`.

With `DISTOPT_HEARTBEAT` set, the launcher writes a line every few seconds to its standard input. When the lines stop,
because the launcher was killed or the link is down, the agent ends the engine: engines that are cut off wait for
minutes and ignore SIGTERM.

With `--meet`, the engine is started when the rendezvous can be reached: a pod may be there minutes before the first one
has its image, or its name an address, and torchrun gives up after one.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from distopt.launchers import GRACE_VARIABLE, HEARTBEAT_VARIABLE, HOSTS_VARIABLE, INTERFACE_VARIABLE

from .network import interface_among, is_here, resolve
from .processes import adopt_orphans, die_with_parent, kill_descendants

SILENCE_S = 25.0  # longer than ssh takes to give up (ServerAliveInterval times ServerAliveCountMax)
POLL_S = 0.5
REMIND_S = 30.0
STOP = b"stop\n"
ALIVE = b"alive\n"


def interface_env(env: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """Returns the variables that tell gloo, NCCL and Horovod which interface has this host's address."""
    hosts = env.get(HOSTS_VARIABLE, "").split(",")
    name = env.get(INTERFACE_VARIABLE) or (interface_among(hosts) if hosts != [""] else None)
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE")
    return {variable: name for variable in variables if variable not in env} if name else {}


def wait_for_meeting(endpoint: str, asked: Sequence[int]) -> None:
    """Returns once NAME:PORT answers, or NAME is this host, or a signal has come."""
    name, _, port = endpoint.rpartition(":")
    said = float("-inf")
    while not asked:
        address = resolve(name)
        if address is not None and (is_here(name) or _answers(address, int(port))):
            return
        if time.monotonic() > said + REMIND_S:
            found = "it has no address yet" if address is None else f"{address} does not answer yet"
            print(f"agent: waiting for {endpoint}: {found}", file=sys.stderr, flush=True)
            said = time.monotonic()
        time.sleep(POLL_S)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def main(argv: Sequence[str]) -> int:
    """Runs the engine until it ends, or is told to, or no word comes from the launcher any more."""
    die_with_parent()
    split = argv.index("--") if "--" in argv else len(argv)
    options, engine_argv = argv[:split], argv[split + 1 :]
    if not engine_argv or (options and (len(options) != 2 or options[0] != "--meet")):
        print(
            "usage: python -m distopt.launch.worker.host_agent [--meet NAME:PORT] -- COMMAND [ARGUMENT …]",
            file=sys.stderr,
        )
        return 2
    grace_s = float(os.environ.get(GRACE_VARIABLE, "30"))
    adopt_orphans()
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: asked.append(got))
    if options:
        wait_for_meeting(options[1], asked)
    if asked:
        return 128 + asked[0]
    engine = subprocess.Popen(
        engine_argv, stdin=subprocess.DEVNULL, env={**os.environ, **interface_env(os.environ)},
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    watched = HEARTBEAT_VARIABLE in os.environ
    heard, kill_at = time.monotonic(), float("inf")
    try:
        while engine.poll() is None and time.monotonic() < kill_at:
            if not watched:
                time.sleep(POLL_S)
            elif select.select([0], [], [], POLL_S)[0]:
                data = os.read(0, 4096)
                heard = time.monotonic()
                if not data:
                    print("agent: the launcher has gone", file=sys.stderr)
                    return 1
                if STOP in data:
                    asked.append(signal.SIGTERM)
            if watched and time.monotonic() - heard > SILENCE_S:
                print(f"agent: no word from the launcher for {SILENCE_S:g} s", file=sys.stderr)
                return 1
            if asked and kill_at == float("inf"):
                kill_at = time.monotonic() + grace_s + 6
                engine.terminate()
    finally:
        kill_descendants(os.getpid())
    status = engine.wait()
    # In a pod nobody else tells that the run was asked to stop: torchrun ends with 1, whatever its workers end with.
    return 128 + asked[0] if asked and status and not watched else status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)

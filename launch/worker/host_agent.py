"""Stands on each host between ssh and a launcher: `python -m MODULE [--meet NAME:PORT] [--run-dir DIR] -- LAUNCHER…`.

With `DISTOPT_HEARTBEAT` set, `distopt launch` writes the run's secrets to the agent's standard input, then a line every
few seconds. When the lines stop, since `distopt launch` was killed or the link is down, the agent ends the launcher of
its host: launchers that are cut off wait for minutes and ignore SIGTERM.

With `--meet`, the launcher is started when the rendezvous can be reached. A pod may be there minutes before the first
one has its image, or its name an address, and torchrun gives up after one minute.

With `--run-dir`, the agent ends with 2 where a worker did, since its configuration or its arguments were refused, or
has ended by an error that would come again. The launcher's status alone does not tell, since torchrun's is 1 whatever
its workers' is.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from socket import create_connection

from distopt.launchers import GRACE_VARIABLE, HEARTBEAT_VARIABLE, USAGE_ERROR

from . import events
from .network import is_here, library_env, resolve
from .processes import adopt_orphans, die_with_parent, heeded, kill_descendants
from .streams import read_secrets

SILENCE_S = 25.0  # longer than ssh takes to give up (ServerAliveInterval times ServerAliveCountMax)
KILL_MARGIN_S = 6.0  # supervisors kill at the end of the grace time, launchers 5 s after them
POLL_S = 0.5
REMIND_S = 30.0
STOP = b"stop\n"
ALIVE = b"alive\n"
OPTIONS = ("--meet", "--run-dir")
USAGE = "usage: python -m distopt.launch.worker.host_agent [--meet NAME:PORT] [--run-dir DIR] -- COMMAND [ARGUMENT …]"


def main(argv: Sequence[str]) -> int:
    """Runs the launcher until it ends, is asked to stop, or `distopt launch` is not heard of any more."""
    die_with_parent()
    split = argv.index("--") if "--" in argv else len(argv)
    options = dict(zip(argv[:split:2], argv[1:split:2], strict=False))
    command = argv[split + 1 :]
    if not command or split % 2 or not options.keys() <= set(OPTIONS):
        print(USAGE, file=sys.stderr)
        return USAGE_ERROR

    adopt_orphans()
    received: list[int] = []
    for number in (signal.SIGTERM, *heeded((signal.SIGINT, signal.SIGHUP))):
        signal.signal(number, lambda number, _: received.append(number))
    if "--meet" in options:
        wait_for_rendezvous(options["--meet"], received)
    if received:
        return 128 + received[0]
    reader = events.Reader(Path(options["--run-dir"])) if "--run-dir" in options else None

    if HEARTBEAT_VARIABLE in os.environ and select.select([0], [], [], SILENCE_S)[0]:
        os.environ.update(read_secrets())
    launcher = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env={**os.environ, **library_env(os.environ)},
        start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        is_cut_off = _wait(launcher, received)
    finally:
        kill_descendants(os.getpid())
    if is_cut_off:
        return 1

    status = launcher.wait()
    if received and status and HEARTBEAT_VARIABLE not in os.environ:
        # In a pod, this status alone shows that the run was asked to stop: torchrun's is 1 whatever its workers' is.
        return 128 + received[0]
    if status and reader is not None and _is_refused(reader):
        return USAGE_ERROR
    return status


def _is_refused(reader: events.Reader) -> bool:
    """Returns whether a worker has ended as it would again: refused, or by another error that is permanent."""
    ends = [event for event in reader.new() if isinstance(event, events.End)]
    return any(end.worker_error is not None and end.worker_error.permanent for end in ends)


def wait_for_rendezvous(endpoint: str, received: Sequence[int]) -> None:
    """Returns once NAME:PORT answers, or NAME is this host, or a signal has come.

    Args:
        endpoint: Where the launchers meet.
        received: The numbers of signals, which a handler appends.
    """
    name, _, port = endpoint.rpartition(":")
    remind_at = time.monotonic()
    while not received:
        address = resolve(name)
        if address is not None and (is_here(name) or _answers(address, int(port))):
            return
        if time.monotonic() >= remind_at:
            reason = "it has no address yet" if address is None else f"{address} does not answer yet"
            print(f"agent: waiting for {endpoint}: {reason}", file=sys.stderr, flush=True)
            remind_at = time.monotonic() + REMIND_S
        time.sleep(POLL_S)


def _answers(address: str, port: int) -> bool:
    try:
        create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def _wait(launcher: subprocess.Popen[bytes], received: list[int]) -> bool:
    """Waits until the launcher ends or has to be killed; true where `distopt launch` is not heard of any more.

    A request to stop, a signal or a line, is passed on once as SIGTERM. The caller kills what is left.
    """
    grace_s = float(os.environ.get(GRACE_VARIABLE, "30"))
    has_heartbeat = HEARTBEAT_VARIABLE in os.environ
    last_beat = time.monotonic()
    kill_at = float("inf")

    while launcher.poll() is None and time.monotonic() < kill_at:
        if not has_heartbeat:
            time.sleep(POLL_S)
        elif select.select([0], [], [], POLL_S)[0]:
            data = os.read(0, 4096)
            last_beat = time.monotonic()
            if not data:
                print("agent: `distopt launch` has ended", file=sys.stderr)
                return True
            if STOP in data:
                received.append(signal.SIGTERM)
        if has_heartbeat and time.monotonic() - last_beat > SILENCE_S:
            print(f"agent: no heartbeat from `distopt launch` for {SILENCE_S:g} s", file=sys.stderr)
            return True
        if received and kill_at == float("inf"):
            kill_at = time.monotonic() + grace_s + KILL_MARGIN_S
            launcher.terminate()
    return False


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)

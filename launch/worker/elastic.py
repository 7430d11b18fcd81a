"""A worker's new place in an elastic Horovod world, asked of horovodrun's rendezvous.

When a host is lost, horovodrun gives the others new ranks as soon as each has asked for one. Horovod asks in a process
that goes on by itself (`hvd.elastic.run`); for a worker that has ended, its guard asks and starts it again, so that it
resumes from the last checkpoint as under torchrun.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from distopt.launchers import ROUND_FILE

# The rounds of an elastic Horovod world, in a file of the run directory that the driver writes and guards read.
#
# In each round the driver gives every worker its place. A round is over when a lost host is back: workers save and
# end, and their guards ask for new places. A guard that sees a later round than its own was left behind on a lost
# host.


def begin(run_dir: Path, number: int) -> None:
    """Writes down a new round."""
    _write(run_dir, f"{number}\n")


def end(run_dir: Path, number: int) -> None:
    """Writes down that a round is over."""
    _write(run_dir, f"{number} over\n")


def read(run_dir: Path) -> tuple[int, bool]:
    """Returns the number of the last round, 0 before the first one, and whether it is over."""
    try:
        words = (run_dir / ROUND_FILE).read_text().split()
    except OSError:
        return 0, False
    return int(words[0]), len(words) > 1


def _write(run_dir: Path, text: str) -> None:
    """Puts the whole file in place at once."""
    new = run_dir / f".{ROUND_FILE}.{os.getpid()}"
    new.write_text(text)
    new.replace(run_dir / ROUND_FILE)


# In the order in which horovodrun answers (horovod/runner/common/util/hosts.py, SlotInfo).
_ANSWER = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
CONNECT_TIMEOUT_S = 20.0  # a host that is cut off must not come back with an old worker
ANSWER_TIMEOUT_S = 600.0  # horovodrun answers when it knows of all workers; a dead host is known when ssh gives it up


def is_elastic(env: Mapping[str, str]) -> bool:
    """Whether horovodrun started this process in a world that may change."""
    return env.get("HOROVOD_ELASTIC") == "1"


def next_place(env: Mapping[str, str], wait: Callable[[], bool]) -> dict[str, str]:
    """Returns the variables of this process's next place; empty where there is none, since the run is at its end.

    Args:
        env: The variables that horovodrun gave this process.
        wait: Called again and again until the answer comes; false gives up.
    """
    answer: list[str] = []
    asking = threading.Thread(target=_ask, args=(env, answer), daemon=True)
    asking.start()
    while asking.is_alive():
        if not wait():
            return {}
    numbers = answer[0].split(",") if answer else []
    if len(numbers) != len(_ANSWER) or int(numbers[0]) < 0:
        return {}
    return {f"HOROVOD_{name}": number for name, number in zip(_ANSWER, numbers, strict=True)}


def _ask(env: Mapping[str, str], answer: list[str]) -> None:
    from http.client import HTTPConnection, HTTPException  # every guard would wait for it

    host, port = env["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(env["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    connection = HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_TIMEOUT_S)
        connection.request("GET", f"/rank_and_size/{env['HOROVOD_HOSTNAME']}:{env['HOROVOD_LOCAL_RANK']}")
        response = connection.getresponse()
        if response.status == 200:
            answer.append(response.read().decode())
    except (OSError, HTTPException):
        return
    finally:
        connection.close()

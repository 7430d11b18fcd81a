"""Elastic Horovod: the rounds of a changing world, and the rank that a worker gets in the next one.

Under `hvd.elastic.run` a process stays when the world changes, and asks horovodrun for its new rank itself. distopt has
a simpler way that works for any script: the worker ends, its supervisor asks in its place and starts it again with the
new rank, and it resumes from the last checkpoint, as under torchrun.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from distopt.launchers import ROUND_FILE

CONNECT_TIMEOUT_S = 20.0  # a host that is cut off must not come back with an old worker
ANSWER_TIMEOUT_S = 600.0  # horovodrun answers when it knows of all workers; a dead host is known when ssh gives it up

# In the order in which horovodrun answers (horovod/runner/common/util/hosts.py, SlotInfo).
_ANSWER = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


def is_elastic(environ: Mapping[str, str]) -> bool:
    """Returns whether horovodrun started this process in a world that may change."""
    return environ.get("HOROVOD_ELASTIC") == "1"


# Rounds. In each round the driver gives every worker a rank. The number of the round stands in a file of the run
# directory, which the driver writes and supervisors read. A round is over when a lost host is back: workers then save
# and end, and their supervisors ask for new ranks. A supervisor that sees a later round than its own was left behind
# on a host that the driver gave up, and ends its worker for good.


def begin_round(run_dir: Path, number: int) -> None:
    """Records a new round, before any worker learns of its rank in it."""
    _write_round(run_dir, f"{number}\n")


def end_round(run_dir: Path, number: int) -> None:
    """Records that a round is over."""
    _write_round(run_dir, f"{number} over\n")


def read_round(run_dir: Path) -> tuple[int, bool]:
    """Returns the number of the last round, 0 before the first one, and whether it is over."""
    try:
        fields = (run_dir / ROUND_FILE).read_text().split()
    except OSError:
        return 0, False
    return int(fields[0]), len(fields) > 1


def _write_round(run_dir: Path, text: str) -> None:
    """Replaces the whole file at once, so that no reader sees half of it."""
    new = run_dir / f".{ROUND_FILE}.{os.getpid()}"
    new.write_text(text)
    new.replace(run_dir / ROUND_FILE)


# The next rank, from horovodrun's rendezvous.


def next_rank(environ: Mapping[str, str], wait: Callable[[], bool]) -> dict[str, str]:
    """Returns the variables of this process's next rank; empty where there is none, since the run is at its end.

    Args:
        environ: The variables that horovodrun gave this process.
        wait: Called again and again until the answer comes; false gives up.
    """
    answer: list[str] = []
    asking = threading.Thread(target=_ask, args=(environ, answer), daemon=True)
    asking.start()
    while asking.is_alive():
        if not wait():
            return {}

    numbers = answer[0].split(",") if answer else []
    if len(numbers) != len(_ANSWER) or int(numbers[0]) < 0:
        return {}
    return {f"HOROVOD_{name}": number for name, number in zip(_ANSWER, numbers, strict=True)}


def _ask(environ: Mapping[str, str], answer: list[str]) -> None:
    from http.client import HTTPConnection, HTTPException  # takes a while, and most supervisors never need it

    host = environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"]
    port = int(environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    connection = HTTPConnection(host, port, timeout=CONNECT_TIMEOUT_S)
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_TIMEOUT_S)
        connection.request("GET", f"/rank_and_size/{environ['HOROVOD_HOSTNAME']}:{environ['HOROVOD_LOCAL_RANK']}")
        response = connection.getresponse()
        if response.status == 200:
            answer.append(response.read().decode())
    except (OSError, HTTPException):
        return
    finally:
        connection.close()

"""A user's script for the launcher's tests: it needs no torch, and does what its arguments say."""

import json
import os
import signal
import sys
import time
from pathlib import Path


def first(*names: str) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def ready(rank: int) -> None:
    """Tells the test, and waits for all the others of this attempt, as ranks of a real run do."""
    world_size, attempt = int(os.environ["DISTOPT_WORLD_SIZE"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    Path(f"ready-{attempt}-{rank}").touch()
    while len(list(Path().glob(f"ready-{attempt}-*"))) < world_size:
        time.sleep(0.02)


def until_asked(rank: int, ignoring: bool) -> None:
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    ready(rank)
    while ignoring or not asked:
        time.sleep(0.02)
    Path(f"saved-{rank}").write_text(str(len(asked)))
    sys.exit(143)


def main(action: str, who: str = "-1", *rest: str) -> None:
    rank = first("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    print(f"rank {rank} does {action}", flush=True)
    if action == "show":
        shown = {"args": rest, "env": {name: os.environ.get(name) for name in who.split(",")}, "cwd": os.getcwd()}
        Path(f"shown-{rank}.json").write_text(json.dumps(shown))
    elif action in ("wait", "ignore"):
        until_asked(rank, ignoring=action == "ignore" and rank == int(who))
    elif rank != int(who):
        until_asked(rank, ignoring=False)
    elif action == "raise":
        ready(rank)
        raise ValueError("the culprit's own words")
    elif action == "kill":
        ready(rank)
        os.kill(os.getpid(), int(rest[0]))
    elif action == "eat":
        ready(rank)
        eaten = []
        while True:
            eaten.append(bytearray(os.urandom(1 << 20) * 16))
    elif action == "exit":
        ready(rank)
        os._exit(int(rest[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""When a process came how far, in a file: what `bench_recovery` puts together."""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path

FOLDER = "RECOVERY_FOLDER"
"""The variable of the folder with the stamps."""

RANKS = ("RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
IMPORTS_DONE = tuple(f"distopt.backends.{name}" for name in ("torch_dist", "horovod", "mpi"))


def stamp(name: str) -> None:
    """Appends what this process has reached, and when."""
    rank = next((int(os.environ[each]) for each in RANKS if each in os.environ), 0)
    line = json.dumps({"name": name, "time": time.time(), "pid": os.getpid(), "rank": rank}) + "\n"
    with (Path(os.environ[FOLDER]) / "stamps.jsonl").open("ab", buffering=0) as file:
        file.write(line.encode())


class _Watch(MetaPathFinder):
    """Finds nothing; sees which modules are looked for: the backend's when all imports are done."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Stamps the first of the backends."""
        if name in IMPORTS_DONE:
            sys.meta_path.remove(self)
            stamp("imports")


def watch() -> None:
    """Called by `sitecustomize` as soon as the interpreter runs; other processes than workers are left alone."""
    if FOLDER in os.environ and "distopt.launch" in sys.orig_argv and "train" in sys.orig_argv:
        stamp("python")
        sys.meta_path.insert(0, _Watch())

"""The folder of a run as the launcher keeps it: one launcher at a time, and a record of what was submitted."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from distopt.config import RunConfig
from distopt.launchers import FAILURE_FILE, LAUNCH_FILE, LOCK_FILE, LOGS, SECRETS_FILE, STOP_FILE

from .plan import Plan

RUNS = Path("runs")


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used; the message says why."""


@contextmanager
def submission(config: RunConfig, plan: Plan, run_dir: Path) -> Iterator[Path]:
    """Holds the run directory, with the plan's files and secrets written, until the launcher is done with the run.

    Args:
        config: The run.
        plan: What is going to be started.
        run_dir: Where this machine keeps the run's record: its run directory, where that is not in a cluster.

    Raises:
        RunDirectoryError: Another launcher is running there, or nothing can be written; nothing has been changed.
    """
    with _locked(run_dir) as lock:
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            for left in (run_dir / STOP_FILE, run_dir / LOGS / FAILURE_FILE):
                left.unlink(missing_ok=True)
            for path, text in plan.files.items():
                write(path, text, mode=0o777 if text.startswith("#!") else 0o666)
            _write_secrets(config, plan, run_dir)
            record(run_dir, plan)
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        try:
            yield run_dir
        finally:
            (run_dir / SECRETS_FILE).unlink(missing_ok=True)


def claim(run_dir: Path) -> None:
    """Makes the run directory, and refuses one that another launcher holds.

    Raises:
        RunDirectoryError: It is in use, or cannot be written to.
    """
    with _locked(run_dir):
        pass


def _locked(run_dir: Path) -> TextIO:
    """Returns the open lock file, which holds the lock until it is closed."""
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK_FILE).open("a+")
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        holder = (run_dir / LOCK_FILE).read_text().strip() or "another process"
        raise RunDirectoryError(
            f"run_dir: {run_dir} is in use by {holder}; wait for it, `distopt stop {shlex.quote(str(run_dir))}`, "
            "or choose another run_dir"
        ) from None
    return lock


def _unwritable(run_dir: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"run_dir: {run_dir} cannot be written to: {error.strerror}; choose another run_dir, or mend that"
    )


def write(path: Path, text: str, mode: int = 0o666) -> None:
    """Puts a whole file in place at once; a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode), "w") as file:
        file.write(text)
    temporary.replace(path)


def _write_secrets(config: RunConfig, plan: Plan, run_dir: Path) -> None:
    """Hands secrets over by a file that only the user can read, to guards and never to a command line."""
    (run_dir / SECRETS_FILE).unlink(missing_ok=True)
    if not any(command.hidden for command in plan.commands):
        return  # workers inherit them
    names = set(config.launch.secrets).union(*(command.hidden for command in plan.commands))
    secrets = {name: os.environ[name] for name in sorted(names) if name in os.environ}
    if secrets:
        write(run_dir / SECRETS_FILE, json.dumps(secrets), mode=0o600)


def record(run_dir: Path, plan: Plan, **more: Any) -> None:
    """Writes down what was submitted, when, and from where."""
    entry = {
        "platform": plan.platform,
        "submitted": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "directory": os.getcwd(),
        "command": sys.argv,
        "plan": {"commands": [str(command) for command in plan.commands], "files": [str(path) for path in plan.files]},
        **more,
    }
    write(run_dir / LAUNCH_FILE, json.dumps(entry, indent=2) + "\n")

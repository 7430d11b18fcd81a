"""The folder of a run as `distopt launch` keeps it: one process at a time, and a record of what was submitted."""

from __future__ import annotations

import errno
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

from distopt import launchers
from distopt.launchers import CONFIG_FILE, FAILURE_FILE, LAUNCH_FILE, LOCK_FILE, LOGS, STOP_FILE

from .plan import Plan

RUNS = Path(launchers.RUNS)
START_SCRIPT = "start.sh"
"""The script by which `--dry-run --output` shows a plan's commands."""
WRITTEN_FILES = ".distopt-files"
"""Names the files of such a folder that distopt has written, which it may replace."""


class RunDirectoryError(RuntimeError):
    """The run directory cannot be used; the message says why."""


@contextmanager
def submission(plan: Plan, run_dir: Path) -> Iterator[Path]:
    """Holds the run directory, with the plan's files written, as long as the block runs.

    Args:
        plan: What is going to be started.
        run_dir: Where this machine keeps the run's record: its run directory, where that is not in a cluster.

    Raises:
        RunDirectoryError: Another process holds it, or nothing can be written; nothing has been changed.
    """
    # Two runs in one directory would mix their checkpoints and logs. The lock is the kernel's, so it is released
    # however its holder ends, and the text in the file is only for the message.
    with _locked(run_dir) as lock:
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()

            # What an earlier run has left: its stop file would stop this one at once.
            for stale in (run_dir / STOP_FILE, run_dir / LOGS / FAILURE_FILE):
                stale.unlink(missing_ok=True)
            write(run_dir / _STOP_PREPARED, "")
            for path, text in plan.files.items():
                write(path, text, mode=_mode(text))
            record(run_dir, plan)
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        yield run_dir


_STOP_PREPARED = f".{STOP_FILE}.prepared"


def ask_to_stop(run_dir: Path) -> None:
    """Makes the stop file, by the name of one that is there: a full disk has no room for a new one.

    Raises:
        OSError: It could not be made.
    """
    try:
        (run_dir / _STOP_PREPARED).rename(run_dir / STOP_FILE)
    except FileNotFoundError:
        (run_dir / STOP_FILE).touch()


def claim(run_dir: Path) -> None:
    """Makes the run directory, and refuses one that another process holds.

    Raises:
        RunDirectoryError: It is in use, or cannot be written to.
    """
    with _locked(run_dir):
        pass


def _locked(run_dir: Path) -> TextIO:
    """The open lock file, which holds the lock until it is closed."""
    try:
        (run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        _check_logs(run_dir / LOGS)
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


def _check_logs(logs: Path) -> None:
    """Refuses logs of an earlier run that cannot be written to, since they are another user's."""
    for path in (logs, *logs.iterdir()):
        if not os.access(path, os.W_OK | (os.X_OK if path.is_dir() else 0)):
            raise _unwritable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _unwritable(path: Path, error: OSError) -> RunDirectoryError:
    path = Path(error.filename2 or error.filename or path)
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        there = next(each for each in (path, *path.parents) if each.exists())
        kind = "a folder" if there.is_dir() else "a file"
        return RunDirectoryError(f"run_dir: {there} is {kind}; move it away, or choose another run_dir")
    return RunDirectoryError(
        f"run_dir: {path} cannot be written to: {error.strerror}; choose another run_dir, or change its permissions"
    )


def write(path: Path, text: str, mode: int = 0o666) -> None:
    """Writes a file as a whole; a reader sees the old one or the new one.

    Args:
        path: The file; its folder is made.
        text: What it gets.
        mode: Its permissions, less those that the user's mask takes away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened with O_EXCL and O_NOFOLLOW: in a shared folder nobody else may have put a link there.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(temporary, flags, mode), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def write_plan(plan: Plan, folder: Path, run_dir: Path) -> list[Path]:
    """Writes a plan's files to a folder of the user's instead of the run directory.

    Args:
        plan: What would start the run.
        folder: Where the files go, which is made.
        run_dir: Where they would be; below it, their places stay the same.

    Returns:
        The paths of the files. Where the plan has commands, the last one is a script that starts the run.

    Raises:
        FileExistsError: A file is there that was not written by an earlier call; then nothing is written.
        OSError: One cannot be written.
    """
    files = {folder / _below(path, run_dir): text for path, text in plan.files.items()}
    if plan.heartbeat:
        # Nothing but `distopt launch` sends the agents of several hosts what keeps them alive.
        argv = (sys.executable, "-m", "distopt.launch", "launch", "--", str(folder / CONFIG_FILE))
        files[folder / START_SCRIPT] = f"#!/bin/sh\nexec {shlex.join(argv)}\n"
    elif plan.commands:
        files[folder / START_SCRIPT] = f"#!/bin/sh\n{plan}"
    listed = folder / WRITTEN_FILES
    names = {str(path.relative_to(folder)) for path in files}
    known = set(listed.read_text().splitlines()) if listed.exists() else set()
    for name in sorted(names - known):
        if os.path.lexists(folder / name):
            raise FileExistsError(
                errno.EEXIST, "it is there, and is none that --output wrote; name an empty folder", str(folder / name)
            )
    for path in plan.folders:
        (folder / _below(path, run_dir)).mkdir(parents=True, exist_ok=True)
    write(listed, "".join(f"{name}\n" for name in sorted(names | known)))
    for path, text in files.items():
        write(path, text, mode=_mode(text))
    return list(files)


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)


def _mode(text: str) -> int:
    return 0o777 if text.startswith("#!") else 0o666


def record(run_dir: Path, plan: Plan, **more: Any) -> None:
    """Records what was submitted, when, and from where.

    Args:
        run_dir: Where the record is kept.
        plan: What was submitted.
        more: What became of it: the exit status, or the platform's name for the run.
    """
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

"""What a platform is going to do: commands and files, printable before anything is done."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distopt.config import RunConfig, dump_yaml
from distopt.launchers import (
    BINDING_VARIABLE,
    CONFIG_FILE,
    CWD_VARIABLE,
    GRACE_VARIABLE,
    HOSTS_VARIABLE,
    INTERFACE_VARIABLE,
    PREEMPTION_VARIABLE,
    WATCH_STOP_VARIABLE,
    WORLD_SIZE_VARIABLE,
    format_range,
)

from .worker import network

STOP_BY_FILE = {WATCH_STOP_VARIABLE: "1"}
"""Has supervisors watch for the stop file; for the environment of a plan with `stop_by_file`."""


# A plan is data, so that what a platform would do can be read (`--dry-run`), compared with a golden file, and run by a
# shell in place of distopt. Whatever changes this machine or another one is in what carries a plan out: `attach` for
# commands that `distopt launch` stays with, a `Job` for those that a cluster keeps.


@dataclass(frozen=True)
class Command:
    """One process that `distopt launch` starts.

    Attributes:
        argv: Program and arguments.
        env: Variables in addition to those of `distopt launch`.
        secrets: Names of variables whose values a process on another host is sent as the first line of its standard
            input, in JSON, since every user of a machine can read its command lines.
        host: Where it runs, for messages; None is this machine.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: frozenset[str] = frozenset()
    host: str | None = None

    def __str__(self) -> str:
        variables = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        return " ".join([*variables, *map(shlex.quote, self.argv)])


@dataclass(frozen=True)
class Plan:
    """Everything that starting a run does: first the files are written, then the commands are run.

    `str(plan)` is a shell script that would do the same, or the document in which all of it stands. With `heartbeat` it
    is only to be read: the agents listen for `distopt launch`.

    Attributes:
        platform: The platform's name.
        commands: The processes to start, all at once.
        files: The files to write; those that begin with `#!` are made executable.
        stop_by_file: Whether workers are asked to stop by a file that their supervisors watch, since the launcher would
            leave them too little time for a last checkpoint; else the launcher gets a signal.
        heartbeat: Whether each command is an agent (`worker.host_agent`) on a host of its own, which listens for
            heartbeats.
        min_hosts: With `heartbeat`, how many of the commands are enough for the run to continue; None needs all.
        ends_together: Whether the launcher starts no worker again, so that all are to end when one has died.
        folders: Folders to make, besides those of files.
        notes: Comments for those who read the plan.
        document: The file that alone says what is started, of a plan without commands; it is printed as it is.
    """

    platform: str
    commands: tuple[Command, ...]
    files: Mapping[Path, str] = field(default_factory=dict)
    stop_by_file: bool = False
    heartbeat: bool = False
    min_hosts: int | None = None
    ends_together: bool = False
    folders: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    document: Path | None = None

    def __str__(self) -> str:
        sections = [f"# {note}\n" for note in self.notes]
        if self.document is not None:
            return "".join([*sections, self.files[self.document]])

        folders = dict.fromkeys([*(path.parent for path in self.files), *self.folders])
        if folders:
            sections.append(f"mkdir -p {' '.join(shlex.quote(str(path)) for path in folders)}\n")
        for path, text in self.files.items():
            end = delimiter(text)
            name = shlex.quote(str(path))
            sections.append(f"cat > {name} <<'{end}'\n{text.rstrip()}\n{end}\n" if text else f": > {name}\n")

        sections += [f"{command}\n" for command in self.commands]
        return "\n".join(sections)


def delimiter(text: str, end: str = "END") -> str:
    """Returns an end of a here-document that the text does not contain."""
    while end in text.splitlines():
        end += "_"
    return end


def run_files(config: RunConfig) -> dict[Path, str]:
    """Returns the files that every platform writes: the resolved configuration that workers read."""
    return {config.run_dir / CONFIG_FILE: dump_yaml(config)}


def worker_argv(config: RunConfig, python: str, config_source: str | None = None) -> list[str]:
    """Returns the command of one worker below its supervisor: the training loop, or the user's script.

    Args:
        config: The run.
        python: The interpreter, where the worker runs.
        config_source: What `distopt train` reads; by default the file in the run directory.
    """
    supervisor = [python, "-m", "distopt.launch.worker.supervisor", str(config.run_dir), "--"]
    if config.script is not None:
        return [*supervisor, python, _operand(config.script), *config.script_args]
    source = config_source or _operand(str(config.run_dir / CONFIG_FILE))
    return [*supervisor, python, "-m", "distopt.launch", "train", source]


def _operand(path: str) -> str:
    """Keeps a path that starts with a dash from being read as an option."""
    return f"./{path}" if path.startswith("-") else path


def env_of_workers(config: RunConfig, **more: str) -> dict[str, str]:
    """Returns the variables that supervisors and workers need.

    Args:
        config: The run; `launch.env` overrides everything else.
        more: Variables of the platform.
    """
    interface = {INTERFACE_VARIABLE: config.launch.interface} if config.launch.interface else {}

    # Workers that leave the GPUs alone have no reason to be beside them.
    kind = "cpu" if config.launch.binding == "numa" and config.train.device == "cpu" else config.launch.binding
    binding = {} if kind == "numa" else {BINDING_VARIABLE: kind}
    preemption = {PREEMPTION_VARIABLE: config.launch.preemption_file} if config.launch.preemption_file else {}

    # Over ssh a worker starts in the user's home folder, and other hosts may resolve names differently.
    addresses = [network.resolve(host) or host for host in config.launch.hosts]
    elsewhere = {HOSTS_VARIABLE: ",".join(addresses), CWD_VARIABLE: os.getcwd()} if addresses else {}

    return {
        WORLD_SIZE_VARIABLE: format_range(config.launch.world_sizes),
        **interface,
        **binding,
        **preemption,
        **elsewhere,
        GRACE_VARIABLE: f"{config.launch.grace_s:g}",
        **more,
        **config.launch.env,
    }

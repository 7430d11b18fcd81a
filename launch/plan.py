"""What a platform is going to do: commands and files, printable, and nothing done yet."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distopt.config import RunConfig, dump_yaml
from distopt.launchers import (
    CONFIG_FILE,
    CWD_VARIABLE,
    GRACE_VARIABLE,
    HOSTS_VARIABLE,
    INTERFACE_VARIABLE,
    WATCH_STOP_VARIABLE,
    WORLD_SIZE_VARIABLE,
    format_range,
)

from .worker import network

# Tells guards to watch for the stop file.
STOP_BY_FILE = {WATCH_STOP_VARIABLE: "1"}


@dataclass(frozen=True)
class Command:
    """One process that the launcher starts.

    `env` is added to the launcher's own environment. `hidden` names variables that the process must not inherit: the
    engine would write their values on command lines. `host` is where it runs, for messages; none is this machine.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()
    host: str | None = None

    def __str__(self) -> str:
        words = [f"{key}={shlex.quote(value)}" for key, value in sorted(self.env.items())]
        unset = ["env", *(word for name in sorted(self.hidden) for word in ("-u", name))] if self.hidden else []
        return " ".join([*unset, *words, *map(shlex.quote, self.argv)])


@dataclass(frozen=True)
class Plan:
    """Everything that starting a run does: first the files are written, then the commands are run.

    `stop_by_file` tells how workers are asked to end: by the stop file that their guards watch, where the engine would
    leave them too little time for a last checkpoint, else by a signal to the engine. With `heartbeat` each command is
    an agent (`worker.host_agent`) on a host of its own; the run goes on while `least` of them do, by default all.
    `together` says that the engine starts no worker again: when one has died, all are to end.
    """

    platform: str
    commands: tuple[Command, ...]
    files: Mapping[Path, str] = field(default_factory=dict)
    stop_by_file: bool = False
    heartbeat: bool = False
    least: int | None = None
    together: bool = False
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"# {note}\n" for note in self.notes]
        for path, text in self.files.items():
            end, name = _delimiter(text), shlex.quote(str(path))
            parts.append(f"cat > {name} <<'{end}'\n{text.rstrip()}\n{end}\n" if text else f": > {name}\n")
        parts += [f"{command}\n" for command in self.commands]
        return "\n".join(parts)


def _delimiter(text: str) -> str:
    """Returns a here-document's end that the text does not contain."""
    end = "END"
    while end in text.splitlines():
        end += "_"
    return end


def run_files(config: RunConfig) -> dict[Path, str]:
    """Returns the files that every platform writes: the resolved configuration that workers read."""
    return {config.run_dir / CONFIG_FILE: dump_yaml(config)}


def worker_argv(config: RunConfig, python: str, config_source: str | None = None) -> list[str]:
    """Returns the command of one worker: the training loop, or the user's script, watched by a guard.

    Args:
        config: The run.
        python: The interpreter, where the worker runs.
        config_source: What `distopt train` reads; by default the file in the run directory.
    """
    guard = [python, "-m", "distopt.launch.worker.supervisor", str(config.run_dir), "--"]
    if config.script is not None:
        return [*guard, python, _operand(config.script), *config.script_args]
    source = config_source or _operand(str(config.run_dir / CONFIG_FILE))
    return [*guard, python, "-m", "distopt.launch", "train", source]


def _operand(path: str) -> str:
    """Keeps a path that starts with a dash from being read as an option."""
    return f"./{path}" if path.startswith("-") else path


def env_of_workers(config: RunConfig, **more: str) -> dict[str, str]:
    """Returns the variables that guards and workers need, the numbers of workers that are allowed among them."""
    interface = {INTERFACE_VARIABLE: config.launch.interface} if config.launch.interface else {}
    hosts = [network.resolve(host) or host for host in config.launch.hosts]
    elsewhere = {HOSTS_VARIABLE: ",".join(hosts), CWD_VARIABLE: os.getcwd()} if hosts else {}
    return {
        WORLD_SIZE_VARIABLE: format_range(config.launch.world_sizes),
        **interface,
        **elsewhere,
        GRACE_VARIABLE: f"{config.launch.grace_s:g}",
        **more,
        **config.launch.env,
    }

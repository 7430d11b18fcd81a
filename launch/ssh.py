"""Reaching other hosts: options that notice a dead link, accept no changed host key, and never ask for a password."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distopt.config import RunConfig

from .worker import network

SSH = "/usr/bin/ssh"
# Without keepalives, engines wait for ever for the session of a host that has gone.
ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3")
FOLDER = "ssh"


def options(config: RunConfig) -> list[str]:
    """Returns ssh's options; the first value that ssh reads counts, so these go before an engine's own."""
    ssh = config.launch.ssh
    if ssh.known_hosts is None:
        keys = ["StrictHostKeyChecking=accept-new"]
    else:
        keys = ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={_quoted(ssh.known_hosts)}"]
    settings = ["BatchMode=yes", *keys, f"ConnectTimeout={ssh.connect_timeout_s}", *ALIVE, "LogLevel=ERROR"]
    config_file = ["-F", ssh.config] if ssh.config is not None else []
    return [*config_file, *(word for setting in settings for word in ("-o", setting))]


def _quoted(path: str) -> str:
    """Quotes a path for an ssh option, where spaces separate and % starts a token."""
    return '"' + path.replace("%", "%%") + '"' if set(path) & set(" %\t") else path


def remote(config: RunConfig, host: str, argv: Sequence[str]) -> list[str]:
    """Returns the command that runs `argv` on `host`; the words arrive there as they are."""
    return [SSH, *options(config), "-T", "--", host, shlex.join(argv)]


def wrapper(config: RunConfig) -> dict[Path, str]:
    """Returns a program named `ssh` for engines that know no options of ssh: put its folder first on PATH."""
    text = "#!/bin/sh\n# distopt: the engine's ssh, with the options of the run; the first value of an option counts.\n"
    return {config.run_dir / FOLDER / "ssh": f'{text}exec {shlex.join([SSH, *options(config)])} "$@"\n'}


def unreachable(config: RunConfig, hosts: Sequence[str]) -> list[str]:
    """Tries every host at once and returns what keeps the launcher out, each within the connection's timeout."""
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return [problem for problem in pool.map(lambda host: _try(config, host), hosts) if problem]


def blind(config: RunConfig, path: Path) -> list[str]:
    """Returns what keeps hosts from seeing a file that has just been written here: each has a folder of its own."""
    hosts = [host for host in config.launch.hosts if not network.is_here(host)]

    def look(host: str) -> int:
        argv = remote(config, host, ["test", "-e", str(path.resolve())])
        return subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL).returncode

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return [
            f"launch.hosts: {host} does not see {path}, which is here; the command must be given in a folder that all "
            "hosts share"
            for host, status in zip(hosts, pool.map(look, hosts), strict=True)
            if status == 1
        ]


def _try(config: RunConfig, host: str) -> str | None:
    here = str(Path.cwd())
    limit_s = config.launch.ssh.connect_timeout_s + 15
    look = 'cd -- "$0" || exit 3; test -x "$1" || exit 4; nproc'
    argv = remote(config, host, ["sh", "-c", look, here, sys.executable])
    by_hand = shlex.join([*argv[:-3], "--", host, "true"])
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        return f"launch.hosts: there is no {SSH} here; install openssh-client"
    except subprocess.TimeoutExpired:
        return f"launch.hosts: {host} answered nothing within {limit_s} s; try `{by_hand}`"
    if done.returncode == 255:
        said = " ".join(line for line in done.stderr.splitlines() if line.strip("@ "))[:300]  # without ssh's banner
        return f"launch.hosts: {host} cannot be reached: {said}; try `{by_hand}`"
    if done.returncode == 4:
        return f"launch.hosts: {host} has no {sys.executable}; install distopt there in the same place, or share it"
    if done.returncode:
        return f"launch.hosts: {host} has no folder {here}; the command must be given in a folder that all hosts share"
    return next(iter(slot_problems(config, host, int(done.stdout.split()[-1]))), None)


def host_problems(hosts: Sequence[str]) -> list[str]:
    """Returns what would make workers of several hosts call the wrong machine."""
    problems = []
    for host in hosts:
        address = network.resolve(host)
        if address is None:
            problems.append(
                f"launch.hosts: {host} resolves to no address here; add it to /etc/hosts or name its address instead"
            )
        elif len(hosts) > 1 and network.is_loopback(address):
            problems.append(
                f"launch.hosts: {host} resolves to {address}, where no other host reaches it; "
                "correct /etc/hosts or name the address that the others use"
            )
    return problems


def slot_problems(config: RunConfig, host: str, cores: int) -> list[str]:
    """Returns whether a host has fewer cores than it gets processes; two processes have room anywhere."""
    workers = config.launch.workers
    if workers <= max(2, cores) or config.launch.oversubscribe:
        return []
    return [
        f"launch.workers: {workers} processes, but {host} has {cores} cores; "
        f"set launch.workers={cores}, or launch.oversubscribe=true to let them share"
    ]

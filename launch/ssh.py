"""Reaching other hosts: options that notice a dead link, accept no changed host key, and never ask for a password."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distopt.config import RunConfig
from distopt.launchers import SECRETS_VARIABLE

from .findings import Finding
from .worker import network

SSH = "/usr/bin/ssh"
FOLDER = "ssh"
"""Folder of the run directory with a program named `ssh`."""

COUNT_CORES = "from distopt.cgroups import available_cores; print(available_cores())"

# Without keepalives, a launcher would wait without end for the session of a host that was switched off: TCP alone
# notices only what it cannot deliver, and a session that waits for output sends nothing.
ANSWER_MARGIN_S = 15  # for the host to answer, once it is connected
_ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3")


def options(config: RunConfig) -> list[str]:
    """Returns ssh's options; ssh takes the first value that it reads, so these go before those of a launcher."""
    ssh = config.launch.ssh
    if ssh.known_hosts is None:
        keys = ["StrictHostKeyChecking=accept-new"]
    else:
        keys = ["StrictHostKeyChecking=yes", f"UserKnownHostsFile={_quoted(ssh.known_hosts)}"]
    settings = ["BatchMode=yes", *keys, f"ConnectTimeout={ssh.connect_timeout_s}", *_ALIVE, "LogLevel=ERROR"]
    config_file = ["-F", ssh.config] if ssh.config is not None else []
    return [*config_file, *(argument for setting in settings for argument in ("-o", setting))]


def _quoted(path: str) -> str:
    """Quotes a path for an ssh option, where spaces separate and % starts a token."""
    return '"' + path.replace("%", "%%") + '"' if set(path) & set(" %\t") else path


def remote(config: RunConfig, host: str, argv: Sequence[str]) -> list[str]:
    """Returns the command that runs `argv` on `host`; the arguments arrive there unchanged."""
    return [SSH, *options(config), "-T", "--", host, shlex.join(argv)]


def wrapper(config: RunConfig) -> dict[Path, str]:
    """Returns a program named `ssh` for launchers that know no options of ssh: put its folder first on PATH."""
    comment = "# distopt: the launcher's ssh, with the options of the run; the first value of an option counts."
    command = f'{shlex.join([SSH, *options(config)])} "$@"'
    # `printf` is the shell's own, so that its argument is on no command line.
    with_secrets = (
        f'if [ -n "${SECRETS_VARIABLE}" ]; then\n  printf \'%s\\n\' "${SECRETS_VARIABLE}" | {command}\n  exit\nfi\n'
    )
    return {config.run_dir / FOLDER / "ssh": f"#!/bin/sh\n{comment}\n{with_secrets}exec {command}\n"}


def check_host_names(config: RunConfig) -> list[Finding]:
    """Returns the hosts whose names stand for no machine, or for the wrong one, which ssh would otherwise try."""
    hosts = config.launch.hosts
    return [finding for host in hosts if (finding := check_name(host, alone=len(hosts) == 1))]


def check_hosts(config: RunConfig) -> Iterator[Finding]:
    """Yields what keeps the hosts of a run from working together; each is tried within the connection's timeout."""
    others = [host for host in config.launch.hosts if not network.is_here(host)]
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        for findings in pool.map(lambda host: list(_check_host(config, host)), others):
            yield from findings


def check_name(host: str, *, alone: bool) -> Finding | None:
    """Returns what would make workers of other hosts call the wrong machine by this name."""
    address = network.resolve(host)
    if address is None:
        return Finding(
            "launch.hosts",
            f"{host} resolves to no address here",
            "add it to /etc/hosts or name its address instead",
        )
    if network.is_loopback(address) and not alone:
        return Finding(
            "launch.hosts",
            f"{host} resolves to {address}, where no other host reaches it",
            "correct /etc/hosts or name the address that the others use",
        )
    return None


def check_cores(config: RunConfig, host: str, cores: int) -> Iterator[Finding]:
    """Yields that a host has fewer cores than it gets processes; two processes have room anywhere."""
    workers = config.launch.workers
    if workers > max(2, cores) and not config.launch.oversubscribe:
        yield Finding(
            "launch.workers",
            f"{workers} processes, but {host} has {cores} cores",
            f"set launch.workers={cores}, or launch.oversubscribe=true to let them share",
        )


def check_folder(config: RunConfig, path: Path) -> list[Finding]:
    """Returns the hosts that do not see a file which has just been written here: they do not share the folder."""
    hosts = [host for host in config.launch.hosts if not network.is_here(host)]

    def is_absent(host: str) -> int:
        argv = remote(config, host, ["test", "-e", str(path.resolve())])
        return subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL).returncode

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return [
            Finding(
                "launch.hosts",
                f"{host} does not see {path}, which is here",
                "run the command in a folder that all hosts share",
            )
            for host, status in zip(hosts, pool.map(is_absent, hosts), strict=True)
            if status == 1
        ]


def _check_host(config: RunConfig, host: str) -> Iterator[Finding]:
    # One session answers everything: the script's exit status says which test failed, and its output counts the cores.
    key = "launch.hosts"
    here = str(Path.cwd())
    limit_s = config.launch.ssh.connect_timeout_s + ANSWER_MARGIN_S
    script = f'cd -- "$0" || exit 3; test -x "$1" || exit 4; exec "$1" -c "{COUNT_CORES}"'
    argv = remote(config, host, ["sh", "-c", script, here, sys.executable])
    by_hand = f"try `{shlex.join([*argv[:-3], '--', host, 'true'])}`"

    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        yield Finding(key, f"there is no {SSH} here", "install openssh-client")
        return
    except subprocess.TimeoutExpired:
        yield Finding(key, f"{host} did not answer within {limit_s} s", by_hand)
        return

    match done.returncode:
        case 0:
            yield from check_cores(config, host, int(done.stdout.split()[-1]))
        case 255:  # of ssh itself, whose banner is left out
            message = " ".join(line for line in done.stderr.splitlines() if line.strip("@ "))[:300]
            yield Finding(key, f"{host} cannot be reached: {message}", by_hand)
        case 4:
            yield Finding(key, f"{host} has no {sys.executable}", "install distopt there at the same path, or share it")
        case _:
            yield Finding(key, f"{host} has no folder {here}", "run the command in a folder that all hosts share")

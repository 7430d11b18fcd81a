"""Names, addresses and interfaces of this machine, so that no worker offers others an address they cannot reach."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # guards and agents start with the standard library alone
    from distopt.config import RunConfig

# linux/sockios.h
_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """Returns the IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def resolve(host: str) -> str | None:
    """Returns the IPv4 address that a host name stands for here; None for a name that resolves nowhere."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return None


def is_loopback(address: str) -> bool:
    """Whether an address reaches this machine alone.

    Example:
        >>> is_loopback("127.0.1.1"), is_loopback("10.77.0.1")
        (True, False)
    """
    return ipaddress.ip_address(address).is_loopback


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    address = resolve(host)
    return address is not None and (is_loopback(address) or address in interfaces().values())


def interface_among(hosts: Sequence[str]) -> str | None:
    """Returns the interface that has the address of one of `hosts`: the one by which they know this machine."""
    addresses = {resolve(host) for host in hosts}
    return next((name for name, address in interfaces().items() if address in addresses), None)


def free_port() -> int:
    """Returns a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def host_problems(hosts: Sequence[str]) -> list[str]:
    """Returns what would make workers of several hosts call the wrong machine."""
    problems = []
    for host in hosts:
        address = resolve(host)
        if address is None:
            problems.append(
                f"launch.hosts: {host} resolves to no address here; add it to /etc/hosts or name its address instead"
            )
        elif len(hosts) > 1 and is_loopback(address):
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

"""Names, addresses and interfaces of this machine, so that no worker offers others an address they cannot reach."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence

from distopt.launchers import HOSTS_VARIABLE, INTERFACE_VARIABLE

# linux/sockios.h
_SIOCGIFADDR = 0x8915


def interfaces() -> dict[str, str]:
    """Returns the IPv4 address of each interface that has one."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            # struct ifreq: 16 bytes of name, then a sockaddr_in, whose address is behind two times two bytes.
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def resolve(host: str) -> str | None:
    """Returns the IPv4 address that a host name stands for on this machine; None for a name without one."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):  # a label that is empty or too long cannot be encoded
        return None


def is_loopback(address: str) -> bool:
    """Returns whether an address reaches this machine alone.

    Example:
        >>> is_loopback("127.0.1.1"), is_loopback("10.77.0.1")
        (True, False)
    """
    return ipaddress.ip_address(address).is_loopback


def is_here(host: str) -> bool:
    """Returns whether a host is this machine."""
    address = resolve(host)
    return address is not None and (is_loopback(address) or address in interfaces().values())


def interface_among(hosts: Sequence[str]) -> str | None:
    """Returns the interface that has the address of one of `hosts`: the one by which they know this machine."""
    addresses = {resolve(host) for host in hosts}
    return next((name for name, address in interfaces().items() if address in addresses), None)


def bind_error(address: str, port: int) -> str:
    """Returns why no process can listen at a port of this machine; empty when one can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


# All that distopt tells gloo, NCCL and Horovod. The rest is left to the libraries, whose defaults are sound: NCCL takes
# InfiniBand ports that are active, peer access and shared memory by itself, and torch ends a process whose collective
# has failed (TORCH_NCCL_ASYNC_ERROR_HANDLING is 3). `distopt doctor` says what they will find and what is set.
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE")
LIBRARY_DEFAULTS = {"NCCL_DEBUG": "WARN"}
"""By itself NCCL says only that there was an "unhandled system error", and the reason in its warnings."""

LIBRARY_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "HOROVOD_")
"""Of variables by which these libraries are set up."""


def library_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of gloo, NCCL and Horovod: which interface has this host's address, and their warnings.

    By themselves these libraries take the address that the host's own name stands for, which on many machines is the
    loopback address, or that of an interface that the other hosts do not reach.

    Args:
        environ: What a worker would have. What it sets for a library stays.
    """
    hosts = environ.get(HOSTS_VARIABLE, "").split(",")
    interface = environ.get(INTERFACE_VARIABLE) or (interface_among(hosts) if hosts != [""] else None)
    chosen = dict.fromkeys(INTERFACE_VARIABLES, interface) if interface else {}
    return {name: value for name, value in {**LIBRARY_DEFAULTS, **chosen}.items() if name not in environ}

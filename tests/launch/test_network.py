"""This machine's addresses and interfaces, and what the libraries of workers are told of them."""

from __future__ import annotations

import socket

import pytest

from distopt.launch.worker import network


def test_loopback_is_an_interface_of_this_machine():
    assert network.interfaces()["lo"] == "127.0.0.1"
    assert network.interface_among(["localhost"]) == "lo"
    assert network.interface_among(["203.0.113.9"]) is None  # an address of documentation (RFC 5737)


def test_host_is_here_by_any_of_its_addresses():
    assert network.is_here("localhost") and network.is_here("127.0.0.1")
    assert all(network.is_here(address) for address in network.interfaces().values())
    assert not network.is_here("203.0.113.9")
    assert not network.is_here("nosuchhost.invalid")


def test_name_without_an_address_resolves_to_none():
    assert network.resolve("nosuchhost.invalid") is None
    assert network.resolve("a..b") is None and network.resolve("a" * 64) is None  # which no name server is asked for
    assert network.resolve("127.0.0.1") == "127.0.0.1"


def test_port_that_is_in_use_is_told_from_a_free_one():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert network.bind_error("127.0.0.1", port) == "Address already in use"
    assert network.bind_error("127.0.0.1", port) == ""


@pytest.mark.parametrize(
    ("environ", "variables"),
    [
        ({}, {}),
        ({"DISTOPT_HOSTS": "203.0.113.1,203.0.113.2"}, {}),  # neither is this machine
        ({"DISTOPT_HOSTS": "127.0.0.1,203.0.113.2"}, dict.fromkeys(["GLOO", "NCCL", "HOROVOD"], "lo")),
        ({"DISTOPT_INTERFACE": "ib0"}, dict.fromkeys(["GLOO", "NCCL", "HOROVOD"], "ib0")),
        ({"DISTOPT_INTERFACE": "ib0", "NCCL_SOCKET_IFNAME": "eth1"}, dict.fromkeys(["GLOO", "HOROVOD"], "ib0")),
    ],
)
def test_libraries_are_told_the_interface_that_has_this_hosts_address(environ, variables):
    names = {"GLOO": "GLOO_SOCKET_IFNAME", "NCCL": "NCCL_SOCKET_IFNAME", "HOROVOD": "HOROVOD_GLOO_IFACE"}
    expected = {names[library]: interface for library, interface in variables.items()}
    assert network.library_env(environ) == {"NCCL_DEBUG": "WARN", **expected}
    assert "NCCL_DEBUG" not in network.library_env({**environ, "NCCL_DEBUG": "INFO"})

"""A store for the side channel where the library brings none: a TCP store on rank 0, bound to one address."""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

from torch._C._distributed_c10d import Store, TCPStore

from distopt.backends.base import BackendError, Json

CLIENT_TIMEOUT = timedelta(seconds=30)


def make_side_store(rank: int, gather: Callable[[Json], list[Json]]) -> Store:
    """Returns a client of a new store on rank 0; a collective call.

    The server listens on the loopback address when all ranks share a machine, else on rank 0's own address, never on
    all
    interfaces: it asks nobody for a password. It holds JSON and is read by nothing that unpickles.

    Args:
        rank: This process's.
        gather: An `all_gather_json`.
    """
    hosts = gather(socket.gethostname())
    address, listener = "127.0.0.1", None
    if rank == 0:
        if len(set(hosts)) > 1:
            address = _own_address()
        listener = socket.create_server((address, 0))
    where = gather([address, listener.getsockname()[1]] if listener is not None else None)[0]
    try:
        return TCPStore(
            where[0],
            where[1],
            is_master=rank == 0,
            wait_for_workers=False,
            timeout=CLIENT_TIMEOUT,
            master_listen_fd=listener.detach() if listener is not None else None,
        )
    except RuntimeError as error:
        raise BackendError(
            f"rank {rank} cannot reach rank 0's heartbeat store at {where[0]}:{where[1]}. Check that the name "
            f"{hosts[0]!r} means an address that the other machines can reach. torch says: {error}"
        ) from error


def _own_address() -> str:
    try:
        return socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0].__str__()
    except OSError as error:
        raise BackendError(
            f"rank 0's host name {socket.gethostname()!r} has no address. Give it one in the hosts file."
        ) from error

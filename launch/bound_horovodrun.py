"""horovodrun, listening on one address: `python -m distopt.launch.bound_horovodrun ADDRESS ARGUMENT…`.

horovodrun's servers ask nobody for a password and listen on every interface; here they listen on the run's own.
"""

from __future__ import annotations

import socketserver
import sys

_bind = socketserver.TCPServer.server_bind


def main(address: str, *arguments: str) -> int:
    """Runs horovodrun with its arguments; what it would bind to all interfaces is bound to `address`."""

    def bind(server: socketserver.TCPServer) -> None:
        host, port = server.server_address[:2]
        server.server_address = (address if host in ("", "0.0.0.0") else host, port)
        _bind(server)

    socketserver.TCPServer.server_bind = bind  # type: ignore[assignment, method-assign]
    from horovod.runner.launch import run_commandline

    sys.argv = ["horovodrun", *arguments]
    return int(run_commandline() or 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

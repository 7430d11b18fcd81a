"""horovodrun for workers of this machine alone: `python -m distopt.launch.horovodrun_here ARGUMENT…`.

horovodrun's servers ask nobody for a password and listen on every interface; here they listen on the loopback one.
"""

from __future__ import annotations

import socketserver
import sys

_bind = socketserver.TCPServer.server_bind


def _bind_to_loopback(server: socketserver.TCPServer) -> None:
    host, port = server.server_address[:2]
    server.server_address = ("127.0.0.1" if host in ("", "0.0.0.0") else host, port)
    _bind(server)


def main() -> int:
    """Runs horovodrun."""
    socketserver.TCPServer.server_bind = _bind_to_loopback  # type: ignore[assignment, method-assign]
    from horovod.runner.launch import run_commandline

    sys.argv[0] = "horovodrun"
    return int(run_commandline() or 0)


if __name__ == "__main__":
    sys.exit(main())

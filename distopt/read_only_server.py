"""A small HTTP server that only reads, in a thread: for the state of a run, and for the page of `distopt ui`.

Methods other than GET and HEAD get 405. There is no password, so on a loopback address only requests for a loopback
address or localhost are answered, and none that a page of another site makes. It needs the standard library alone.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

# Probes and one scraper need two or three connections at a time; more would take processor time from training.
CONNECTIONS = 8
CLIENT_S = 5.0

Answer = tuple[HTTPStatus, str, bytes]
"""Status, content type and body."""

Page = Callable[[Mapping[str, str]], Answer]
"""Answers a request, given the values of its query."""


class ReadOnlyServer:
    """Answers requests in a thread, from construction to `close`.

    Args:
        pages: By path.
        port: TCP port, 1 to 65535; 0 takes a free one.
        host: IP address to listen on.
        headers: Sent with every answer.

    Attributes:
        port: The port that it listens on.
        url: Its address, such as `http://127.0.0.1:9400`.

    Raises:
        OSError: The port is taken, or this machine does not have the address.
        OverflowError: The port is no port.
    """

    def __init__(
        self, pages: Mapping[str, Page], port: int, host: str = "127.0.0.1", headers: Mapping[str, str] | None = None
    ) -> None:
        self._server = _Server(host, port, pages, headers or {})
        self.port: int = self._server.server_address[1]
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, name="distopt-serve", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the server."""
        self.close()

    def close(self) -> None:
        """Frees the port; calling it again does nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def text_answer(status: HTTPStatus, text: str) -> Answer:
    """Returns an answer of one line."""
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, host: str, port: int, pages: Mapping[str, Page], headers: Mapping[str, str]) -> None:
        self.pages = pages
        self.headers = headers
        self.loopback = ipaddress.ip_address(host).is_loopback
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._open: dict[Any, None] = {}  # connections that are being answered, the oldest first
        self._lock = Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Binds the address without asking a name server for its name, as HTTPServer would."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread; closes the oldest connection if there are too many, so that probes get through."""
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= CONNECTIONS else None
            self._open.pop(oldest, None)
            self._open[request] = None
        if oldest is not None:
            with suppress(OSError):  # the client may have closed it
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing: a client that closes its connection does not concern the run."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CLIENT_S
    server_version = "distopt"
    sys_version = ""

    def do_GET(self) -> None:
        status, kind, body = self._answer()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        body = b"only GET and HEAD are answered here\n"
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _answer(self) -> Answer:
        # DNS rebinding: a web page can let a name of its domain resolve to 127.0.0.1, and so read what answers there.
        # A browser says with `Origin` which site's page asks; without it, it shows no page what was answered.
        origin = self.headers.get("Origin")
        if self.server.loopback and not _is_local(self.headers.get("Host", "")):
            return text_answer(HTTPStatus.FORBIDDEN, "answers only requests for a loopback address or localhost")
        if self.server.loopback and origin is not None and urlsplit(origin).netloc != self.headers.get("Host", ""):
            return text_answer(HTTPStatus.FORBIDDEN, "answers no requests of other sites' pages")

        path, _, query = self.path.partition("?")
        page = self.server.pages.get(path)
        if page is None:
            return text_answer(HTTPStatus.NOT_FOUND, f"known: {' '.join(self.server.pages)}")
        return page(dict(parse_qsl(query)))

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: probes come every few seconds."""


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False

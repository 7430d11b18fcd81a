"""Health and metrics of a run over HTTP, for probes of Kubernetes and for Prometheus.

====================  =====================================================================================
`/healthz`            200 as long as the process answers
`/readyz`             200 once this rank has met the others and has its state, 503 before
`/livez`              200 while steps are being finished, 503 if none was for `serve.stall_s`, so that
                      Kubernetes, for example, restarts a process that hangs
`/metrics`            the numbers of `Status` in Prometheus' text format; needs the package prometheus-client
====================  =====================================================================================

Everything is read-only: methods other than GET and HEAD get 405. There is no password, so the server listens on the
loopback interface unless the configuration names another address.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock, Thread
from types import TracebackType
from typing import Any

from distopt.config import ServeConfig
from distopt.train.monitor import Status

# Probes and one scraper need two or three connections at a time; more would take processor time from training.
_CONNECTIONS = 8
_CLIENT_S = 5.0

Answer = tuple[HTTPStatus, str, bytes]


class ServeError(RuntimeError):
    """The server cannot listen on the address that the configuration names."""


class StatusServer:
    r"""Answers requests about a run in a thread, from construction to `close`.

    Args:
        status: What the training loop notes.
        port: TCP port, 1 to 65535; 0 takes a free one.
        host: IP address to listen on.
        stall: Time without progress after which `/livez` fails.

    Attributes:
        port: The port that it listens on.
        url: Its address, such as `http://127.0.0.1:9400`.

    Raises:
        ServeError: The port is taken, or this machine does not have the address.

    Cost:
        No work in the training loop; a request takes about a millisecond of another thread.

    Example:
        >>> from urllib.request import urlopen
        >>> with StatusServer(Status(), port=0) as server:
        ...     urlopen(f"{server.url}/healthz", timeout=5).read()
        b'ok\n'
    """

    def __init__(
        self, status: Status, port: int, host: str = "127.0.0.1", stall: timedelta = timedelta(minutes=10)
    ) -> None:
        # Pages are closures over the status and not methods of the handler, which is made anew for each request.
        pages = {
            "/healthz": lambda: _text(HTTPStatus.OK, "ok"),
            "/readyz": lambda: _ready(status),
            "/livez": lambda: _live(status, stall.total_seconds()),
            "/metrics": _metrics_page(status),
        }
        try:
            self._server = _Server(host, port, pages)
        except (OSError, OverflowError) as error:
            raise ServeError(
                f"serve: cannot listen on {host} port {port}: {error}. Set serve.port to a free port (each rank of a "
                "host takes serve.port plus its LOCAL_RANK, 0 if that is not set) and serve.host to an address of this "
                "machine."
            ) from error
        self.port: int = self._server.server_address[1]
        self.url = f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"
        self._thread = Thread(target=self._server.serve_forever, name="distopt-serve", daemon=True)
        self._thread.start()

    def __enter__(self) -> StatusServer:
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


def serving(config: ServeConfig, status: Status, local_rank: int) -> AbstractContextManager[StatusServer | None]:
    """Returns the server that the configuration asks for, as a context; an empty one if it names no port.

    Args:
        config: The section `serve`.
        status: What the training loop notes.
        local_rank: Number of this rank on its host. It is added to the port, so that each rank of a host has a server.
    """
    if config.port is None:
        return nullcontext()
    return StatusServer(status, config.port + local_rank, config.host, timedelta(seconds=config.stall_s))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, host: str, port: int, pages: dict[str, Callable[[], Answer]]) -> None:
        self.pages = pages
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
            oldest = next(iter(self._open)) if len(self._open) >= _CONNECTIONS else None
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
    timeout = _CLIENT_S
    server_version = "distopt"
    sys_version = ""

    def do_GET(self) -> None:
        status, kind, body = self._answer()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
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
        if self.server.loopback and not _is_local(self.headers.get("Host", "")):
            return _text(HTTPStatus.FORBIDDEN, "answers only requests for a loopback address or localhost")
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            return _text(HTTPStatus.NOT_FOUND, f"known: {' '.join(self.server.pages)}")
        return page()

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: probes come every few seconds."""


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _text(status: HTTPStatus, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()


def _ready(status: Status) -> Answer:
    if status.joined:
        return _text(HTTPStatus.OK, "ok")
    return _text(HTTPStatus.SERVICE_UNAVAILABLE, "not ready: waiting for the other ranks or loading a checkpoint")


def _live(status: Status, stall_s: float) -> Answer:
    stalled_s = status.stalled_s()
    text = f"step {status.step}, last progress {stalled_s:.1f} s ago, allowed {stall_s:g} s (serve.stall_s)"
    return _text(HTTPStatus.OK if stalled_s <= stall_s else HTTPStatus.SERVICE_UNAVAILABLE, text)


def _metrics_page(status: Status) -> Callable[[], Answer]:
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    except ImportError:
        missing = "the package prometheus-client is not installed here: pip install 'distopt[prometheus]'"
        return lambda: _text(HTTPStatus.NOT_IMPLEMENTED, missing)
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return lambda: (HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


class _Collector:
    """Turns a status into Prometheus' metrics at each request, without those that were not measured yet."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status
        counters = (
            ("steps", "Steps finished by this process.", status.steps_done),
            ("skipped_steps", "Steps skipped because a gradient was not finite.", status.skipped_steps),
            ("all_reduce_seconds", "Time spent waiting for all-reduces.", status.all_reduce_s),
            ("all_reduce_bytes", "Bytes passed to all-reduces.", status.all_reduce_bytes),
        )
        gauges = (
            ("step", "The last finished step, counted from the start of the run.", status.step),
            ("rows_per_second", "Rows of the data read per second, over all ranks.", status.rows_per_s),
            ("loss_nats", "Loss, mean over the ranks.", status.loss),
            ("gradient_norm", "2-norm of the averaged gradient.", status.gradient_norm),
            (
                "checkpoint_age_seconds",
                "Time since the state of the last committed checkpoint was copied.",
                status.checkpoint_age_s(),
            ),
            ("checkpoint_seconds", "Time for which the last checkpoint blocked the loop.", status.checkpoint_s),
            ("restarts", "How often the launcher has restarted the workers.", status.restarts),
        )
        yield from (CounterMetricFamily(f"distopt_{name}", text, value=value) for name, text, value in counters)
        for name, text, measured in gauges:
            if measured is not None:
                yield GaugeMetricFamily(f"distopt_{name}", text, value=measured)

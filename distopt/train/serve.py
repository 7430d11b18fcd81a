"""What a run tells the outside over HTTP: is it alive, has it joined, does it make progress, and its numbers.

====================  =====================================================================================
`/healthz`            200 as long as the process answers
`/readyz`             200 once this rank has met the others and has its state, else 503
`/livez`              200 while steps are being finished, 503 once none was for `serve.stall_s`, so that
                      whoever started the run (Kubernetes, for example) restarts a hung process
`/metrics`            Prometheus' text format; needs the package prometheus-client
====================  =====================================================================================

Everything is read-only: other methods than GET and HEAD get 405. There is no password, so the address is the loopback
interface unless the configuration names another.
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

# Probes and one scraper need two or three at a time; more would take the processor from training.
_CONNECTIONS = 8
_CLIENT_S = 5.0

Answer = tuple[HTTPStatus, str, bytes]


class ServeError(RuntimeError):
    """The address of the configuration cannot be listened on."""


class StatusServer:
    r"""Answers probes about a run from a thread of its own, from construction to `close`.

    Args:
        status: what the training loop notes.
        port: TCP port, 1 to 65535; 0 takes a free one.
        host: IP address to listen on.
        stall: time without progress after which `/livez` fails.

    Raises:
        ServeError: the port is taken or the address is not this machine's.

    Cost:
        No work in the training loop; a request is answered in about a millisecond of another thread's time.

    Example:
        >>> from urllib.request import urlopen
        >>> with StatusServer(Status(), port=0) as server:
        ...     urlopen(f"{server.url}/healthz", timeout=5).read()
        b'ok\n'
    """

    def __init__(
        self, status: Status, port: int, host: str = "127.0.0.1", stall: timedelta = timedelta(minutes=10)
    ) -> None:
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
        """Frees the port. Doing it twice is no mistake."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serving(config: ServeConfig, status: Status, local_rank: int) -> AbstractContextManager[StatusServer | None]:
    """Returns the server that the configuration asks for, or nothing to enter where it names no port.

    Args:
        config: the section `serve`.
        status: what the training loop notes.
        local_rank: this rank's place on its host, added to the port, so that all ranks of a host can be asked.
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
        self._asking: dict[Any, None] = {}  # connections that are being answered, the oldest first
        self._lock = Lock()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Binds the address without asking a name server who that is, as HTTPServer does."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread; where too many are being answered, the slowest is hung up on, so that probes get in."""
        with self._lock:
            slowest = next(iter(self._asking)) if len(self._asking) >= _CONNECTIONS else None
            self._asking.pop(slowest, None)
            self._asking[request] = None
        if slowest is not None:
            with suppress(OSError):  # it may have ended by itself
                slowest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers one request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._asking.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a client that hangs up is no event of the run."""


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
        # A page in a browser can point a name of its own at 127.0.0.1 and read what answers there.
        if self.server.loopback and not _is_local(self.headers.get("Host", "")):
            return _text(HTTPStatus.FORBIDDEN, "only asked for by a loopback address or localhost")
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            return _text(HTTPStatus.NOT_FOUND, f"known here: {' '.join(self.server.pages)}")
        return page()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: probes come every few seconds."""


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
    return _text(HTTPStatus.SERVICE_UNAVAILABLE, "not joined: still meeting the other ranks or loading a checkpoint")


def _live(status: Status, stall_s: float) -> Answer:
    found = f"step {status.step}, last progress {status.stalled_s():.1f} s ago, allowed {stall_s:g} s (serve.stall_s)"
    return _text(HTTPStatus.OK if status.stalled_s() <= stall_s else HTTPStatus.SERVICE_UNAVAILABLE, found)


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
    """Turns a status into Prometheus' metrics each time they are asked for; what is not measured yet is left out."""

    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        status = self._status
        counters = (
            ("steps", "Steps finished by this process.", status.steps_done),
            ("skipped_steps", "Steps skipped for a gradient that was not finite.", status.skipped_steps),
            ("all_reduce_seconds", "Time spent waiting for sums over the ranks.", status.all_reduce_s),
            ("all_reduce_bytes", "Bytes given into sums over the ranks.", status.all_reduce_bytes),
        )
        gauges = (
            ("step", "The step last finished, counted from the start of the run.", status.step),
            ("rows_per_second", "Rows of the data read per second, over all ranks.", status.rows_per_s),
            ("loss_nats", "Mean over the ranks of the loss.", status.loss),
            ("gradient_norm", "2-norm of the averaged gradient.", status.gradient_norm),
            (
                "checkpoint_age_seconds",
                "Time since the state of the last checkpoint that was committed.",
                status.checkpoint_age_s(),
            ),
            ("checkpoint_seconds", "Time the last checkpoint held up the loop.", status.checkpoint_s),
            ("restarts", "Times the engine has started the workers again.", status.restarts),
        )
        yield from (CounterMetricFamily(f"distopt_{name}", text, value=value) for name, text, value in counters)
        for name, text, measured in gauges:
            if measured is not None:
                yield GaugeMetricFamily(f"distopt_{name}", text, value=measured)

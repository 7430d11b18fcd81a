"""Health and metrics of a run over HTTP, for probes of Kubernetes and for Prometheus.

====================  =====================================================================================
`/healthz`            200 as long as the process answers
`/readyz`             200 once this rank has met the others and has its state, 503 before
`/livez`              200 while steps are being finished, 503 if none was for `serve.stall_s`, so that
                      Kubernetes, for example, restarts a process that hangs
`/metrics`            the numbers of `Status` in Prometheus' text format; needs the package prometheus-client
====================  =====================================================================================

The server listens on the loopback interface unless the configuration names another address; see
`distopt.read_only_server` for what it refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from http import HTTPStatus
from typing import Any

from distopt.config import ServeConfig
from distopt.read_only_server import Answer, Page, ReadOnlyServer, text_answer
from distopt.train.monitor import Status


class ServeError(RuntimeError):
    """The server cannot listen on the address that the configuration names."""


class StatusServer(ReadOnlyServer):
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
            "/healthz": lambda _query: text_answer(HTTPStatus.OK, "ok"),
            "/readyz": lambda _query: _ready(status),
            "/livez": lambda _query: _live(status, stall.total_seconds()),
            "/metrics": _metrics_page(status),
        }
        try:
            super().__init__(pages, port, host)
        except (OSError, OverflowError) as error:
            raise ServeError(
                f"serve: cannot listen on {host} port {port}: {error}. Set serve.port to a free port (each rank of a "
                "host takes serve.port plus its LOCAL_RANK, 0 if that is not set) and serve.host to an address of this "
                "machine."
            ) from error


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


def _ready(status: Status) -> Answer:
    if status.joined:
        return text_answer(HTTPStatus.OK, "ok")
    return text_answer(HTTPStatus.SERVICE_UNAVAILABLE, "not ready: waiting for the other ranks or loading a checkpoint")


def _live(status: Status, stall_s: float) -> Answer:
    stalled_s = status.stalled_s()
    text = f"step {status.step}, last progress {stalled_s:.1f} s ago, allowed {stall_s:g} s (serve.stall_s)"
    return text_answer(HTTPStatus.OK if stalled_s <= stall_s else HTTPStatus.SERVICE_UNAVAILABLE, text)


def _metrics_page(status: Status) -> Page:
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
    except ImportError:
        missing = "the package prometheus-client is not installed here: pip install 'distopt[prometheus]'"
        return lambda _query: text_answer(HTTPStatus.NOT_IMPLEMENTED, missing)
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    return lambda _query: (HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


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

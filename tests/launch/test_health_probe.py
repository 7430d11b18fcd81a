"""A health check tells a worker that is stuck from one that is not there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from distopt.launch.worker import health_probe


@pytest.fixture(params=[200, 503])
def worker(request) -> Iterator[tuple[int, int]]:
    """A worker that answers with a status; yields that and its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if self.path == "/livez" else 404)
            self.end_headers()
            self.wfile.write(b"step 12\n")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield request.param, server.server_port
        server.shutdown()
        thread.join(30)


def test_answer_decides(worker, capsys):
    status, port = worker
    assert health_probe.main(["127.0.0.1", str(port)]) == int(status != 200)
    assert capsys.readouterr().out == "step 12\n"


def test_worker_that_accepts_and_does_not_answer_is_stalled(monkeypatch, capsys):
    monkeypatch.setattr(health_probe, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert health_probe.main(["127.0.0.1", str(mute.getsockname()[1])]) == 1
    assert "the worker does not answer" in capsys.readouterr().out


def test_worker_that_is_not_there_is_not_replaced(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert health_probe.main(["127.0.0.1", str(free.getsockname()[1])]) == 0
    assert "no worker is listening" in capsys.readouterr().out

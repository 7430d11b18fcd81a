"""What a run tells over HTTP, asked for real on the loopback interface."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from http.client import HTTPConnection, HTTPResponse

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from distopt import read_only_server
from distopt.read_only_server import CONNECTIONS
from distopt.train.monitor import Status
from distopt.train.serve import ServeError, StatusServer

PATHS = ("/healthz", "/readyz", "/livez", "/metrics")


@pytest.fixture
def status() -> Status:
    return Status()


@pytest.fixture
def server(status: Status) -> Iterator[StatusServer]:
    with StatusServer(status, port=0, stall=timedelta(seconds=30)) as server:
        yield server


def ask(server: StatusServer, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


def code(server: StatusServer, path: str) -> int:
    return ask(server, path)[0].status


def test_ready_only_after_joining_while_healthy_all_along(server: StatusServer, status: Status) -> None:
    assert (code(server, "/healthz"), code(server, "/readyz")) == (200, 503)
    status.joined = True
    assert (code(server, "/healthz"), code(server, "/readyz")) == (200, 200)


def test_live_fails_once_no_step_was_finished_for_the_time_and_recovers_with_the_next(
    server: StatusServer, status: Status
) -> None:
    assert code(server, "/livez") == 200
    status.after_step(7)
    status.progress_at -= 31
    response, text = ask(server, "/livez")
    assert response.status == 503
    assert "step 7" in text
    assert "serve.stall_s" in text
    status.after_step(8)
    assert code(server, "/livez") == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_every_method_that_could_change_something_is_refused(server: StatusServer, method: str) -> None:
    for path in PATHS:
        response, _ = ask(server, path, method)
        assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")


def test_head_answers_as_get_without_the_body(server: StatusServer) -> None:
    response, text = ask(server, "/healthz", "HEAD")
    assert (response.status, response.headers["Content-Length"], text) == (200, "3", "")


def test_an_unknown_path_is_answered_with_the_known_ones(server: StatusServer) -> None:
    response, text = ask(server, "/../etc/passwd")
    assert response.status == 404
    assert all(path in text for path in PATHS)


def test_a_foreign_host_name_pointed_at_loopback_reads_nothing(server: StatusServer) -> None:
    for host in ("attacker.example", "attacker.example:8080", "127.0.0.1.attacker.example", ""):
        assert ask(server, "/metrics", Host=host)[0].status == 403, host
    for host in ("localhost", f"localhost:{server.port}", "127.0.0.1", "[::1]:80"):
        assert ask(server, "/metrics", Host=host)[0].status == 200, host


def test_metrics_are_what_prometheus_reads_and_unmeasured_ones_are_absent(server: StatusServer, status: Status) -> None:
    families = text_string_to_metric_families(ask(server, "/metrics")[1])
    names = {sample.name for family in families for sample in family.samples}
    always = {"steps_total", "skipped_steps_total", "all_reduce_seconds_total", "all_reduce_bytes_total"}
    always |= {"step", "restarts"}
    assert names == {f"distopt_{name}" for name in always}

    status.after_step(41)
    status.rows_per_s, status.loss, status.gradient_norm = 1e6, -2.5, float("nan")
    status.all_reduce_s, status.all_reduce_bytes, status.skipped_steps = 0.25, 4096, 1
    status.checkpoint_s, status.checkpoint_at = 0.5, status.progress_at - 100
    response, text = ask(server, "/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    values = {
        sample.name.removeprefix("distopt_"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    age = values.pop("checkpoint_age_seconds")
    norm = values.pop("gradient_norm")
    assert 100 <= age < 200
    assert norm != norm
    assert values == {
        "steps_total": 1,
        "step": 41,
        "rows_per_second": 1e6,
        "loss_nats": -2.5,
        "all_reduce_seconds_total": 0.25,
        "all_reduce_bytes_total": 4096,
        "skipped_steps_total": 1,
        "checkpoint_seconds": 0.5,
        "restarts": 0,
    }


def test_without_prometheus_client_probes_answer_and_metrics_name_the_package(
    status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with StatusServer(status, port=0) as server:
        assert code(server, "/healthz") == 200
        response, text = ask(server, "/metrics")
        assert response.status == 501
        assert "distopt[prometheus]" in text


def test_listens_on_loopback_alone_unless_told_otherwise(server: StatusServer) -> None:
    # Other tests of this process may have left listeners of libraries.
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == server.port} == {"127.0.0.1"}


def test_a_taken_port_is_named_with_the_keys_to_change(server: StatusServer) -> None:
    with pytest.raises(ServeError, match=rf"port {server.port}.*serve\.port.*LOCAL_RANK.*serve\.host"):
        StatusServer(Status(), port=server.port)


def test_idle_clients_are_hung_up_on_and_keep_nobody_waiting(
    server: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_only_server._Handler, "timeout", 0.5)
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * CONNECTIONS)]
    for connection in idle:
        connection.settimeout(20)
        try:
            assert connection.recv(1) == b""
        except ConnectionResetError:
            pass
        connection.close()
    assert code(server, "/healthz") == 200


def test_clients_that_dribble_for_ever_leave_room_for_a_probe(server: StatusServer) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CONNECTIONS)]
    try:
        for connection in slow:
            connection.sendall(b"GET /hea")
        assert code(server, "/livez") == 200
        slow[0].settimeout(20)
        assert slow[0].recv(1) == b"", "the slowest is hung up on"
    finally:
        for connection in slow:
            connection.close()


def test_closing_frees_the_port_for_the_next_run_though_a_client_is_still_asking(status: Status) -> None:
    with StatusServer(status, port=0) as first:
        port = first.port
        asking = socket.create_connection(("127.0.0.1", port))
        assert code(first, "/healthz") == 200
    with StatusServer(status, port=port) as second:
        assert code(second, "/healthz") == 200
    second.close()
    asking.close()


def test_ipv6_addresses_are_served(status: Status) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")
    with StatusServer(status, port=0, host="::1") as server:
        connection = HTTPConnection("::1", server.port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().read() == b"ok\n"
        connection.close()


def test_restarts_are_those_that_torchrun_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", json.dumps(3))
    assert Status().restarts == 3

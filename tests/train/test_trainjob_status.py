"""Progress of a run in the status of a TrainJob, sent to a server of HTTPS as the operator's would be."""

from __future__ import annotations

import http.server
import json
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distopt.train.loggers import Loggers, RunInfo
from distopt.train.trainjob_status import TrainJobLogger, trainjob_logger

TIMEOUT_S = 30


class StatusServer(http.server.ThreadingHTTPServer):
    """Takes updates with the right token, as the trainer's controller does, and keeps them."""

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.token = "first"
        self.updates: list[dict] = []
        self.refused = 0
        self.arrived = threading.Condition()

    def wait_for(self, number: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.updates) + self.refused >= number, TIMEOUT_S)


class Handler(http.server.BaseHTTPRequestHandler):
    server: StatusServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_right = self.headers["Authorization"] == f"Bearer {self.server.token}" and self.path == "/status"
        with self.server.arrived:
            if is_right:
                self.server.updates.append(body["trainerStatus"])
            else:
                self.server.refused += 1
            self.server.arrived.notify_all()
        self.send_response(200 if is_right else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StatusServer]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing, which makes the server's certificate")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=status"
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "ca.crt")]
    subprocess.run(
        [*make.split(), *files, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=60
    )
    (tmp_path / "token").write_text("first\n")
    with StatusServer(tmp_path / "ca.crt", tmp_path / "key.pem") as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join(TIMEOUT_S)


def variables(server: StatusServer, folder: Path) -> dict[str, str]:
    return {
        "KUBEFLOW_TRAINER_SERVER_URL": f"https://127.0.0.1:{server.server_port}/status",
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": str(folder / "ca.crt"),
        "KUBEFLOW_TRAINER_SERVER_TOKEN": str(folder / "token"),
    }


def test_progress_and_what_was_measured_arrive_and_the_end_does_too(server, tmp_path):
    logger = trainjob_logger(variables(server, tmp_path))
    assert logger is not None
    with Loggers([logger], RunInfo("run", tmp_path, 50, 200)) as loggers:
        server.wait_for(1)
        for step in range(51, 201):
            loggers.after_step(step)
        loggers.log(200, {"elbo": -12.5, "rows_per_s": 1e6, "gradient_norm": float("nan")})
    first, last = server.updates[0], server.updates[-1]
    assert 25 <= first["progressPercentage"] <= 100
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (100, 0)
    assert last["metrics"] == [{"name": "elbo", "value": "-12.5"}, {"name": "rows_per_s", "value": "1000000"}]
    assert last["lastUpdatedTime"].endswith("Z")


def test_token_is_read_again_since_it_is_replaced_before_it_expires(server, tmp_path):
    address = variables(server, tmp_path)
    paths = [Path(address[f"KUBEFLOW_TRAINER_SERVER_{name}"]) for name in ("CA_CERT", "TOKEN")]
    logger = TrainJobLogger(address["KUBEFLOW_TRAINER_SERVER_URL"], *paths, period_s=0.01)
    with Loggers([logger], RunInfo("run", tmp_path, 0, 10)) as loggers:
        server.wait_for(1)
        server.token = "second"
        (tmp_path / "token").write_text("second\n")
        loggers.after_step(5)
    assert server.updates[-1]["progressPercentage"] == 50


@pytest.mark.parametrize("how", ["wrong token", "other certificate", "no token", "no server"])
def test_server_that_takes_no_update_ends_no_training_and_is_told_once(how, server, tmp_path, capfd):
    environ = variables(server, tmp_path)
    if how == "wrong token":
        server.token = "other"
    elif how == "other certificate":
        environ["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = str(tmp_path / "key.pem")
    elif how == "no token":
        (tmp_path / "token").unlink()
    else:
        environ["KUBEFLOW_TRAINER_SERVER_URL"] = "https://127.0.0.1:9/status"
    logger = trainjob_logger(environ)
    assert logger is not None
    with Loggers([logger], RunInfo("run", tmp_path, 0, 10)) as loggers:
        loggers.after_step(10)
    assert server.updates == []
    assert capfd.readouterr().err.count("the status of the TrainJob cannot be updated at https://127.0.0.1:") == 1


@pytest.mark.parametrize("missing", ["URL", "CA_CERT", "TOKEN"])
def test_pod_without_all_three_variables_sends_nothing(missing):
    environ = {f"KUBEFLOW_TRAINER_SERVER_{name}": "x" for name in ("URL", "CA_CERT", "TOKEN")}
    environ[f"KUBEFLOW_TRAINER_SERVER_{missing}"] = ""
    assert trainjob_logger(environ) is None

"""Two workers of a real run, asked over HTTP while they train."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).parents[2]


def free_neighbours() -> int:
    """Returns a port that is free, as the one after it is."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port: int = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


def ask(port: int, path: str) -> str:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except HTTPError as error:
        return str(error.read().decode())
    except URLError:
        return ""


def metric(port: int, name: str) -> float:
    match = re.search(rf"^distopt_{name} (\S+)", ask(port, "/metrics"), re.MULTILINE)
    return float(match[1]) if match else -1.0


def wait_for(port: int, name: str, least: float) -> None:
    end = time.monotonic() + 90
    while metric(port, name) < least:
        assert time.monotonic() < end, f"{name} is {metric(port, name)} and not yet {least}"
        time.sleep(0.1)


@pytest.mark.timeout(150)
def test_a_worker_that_waits_for_the_others_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    port = free_neighbours()
    config = tmp_path / "alone.yaml"
    config.write_text(
        f"name: alone\nrun_dir: {tmp_path}/run\ntask: tests.train.serve_task:Mean\nserve: {{port: {port}}}\n"
    )
    world = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port + 1),
    }
    command = [sys.executable, "-m", "distopt.launch", "train", str(config)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **world}) as run:
        try:
            end = time.monotonic() + 90
            while not (ask(port, "/healthz") and is_listening(port + 1)):
                assert time.monotonic() < end
                time.sleep(0.1)
            assert ask(port, "/readyz").startswith("not ready")
            run.terminate()
            assert run.wait(timeout=30) == -signal.SIGTERM
        finally:
            run.kill()


@pytest.mark.timeout(150)
def test_each_worker_answers_on_its_own_port_and_tells_what_it_does(tmp_path: Path) -> None:
    port = free_neighbours()
    config = tmp_path / "served.yaml"
    config.write_text(
        f"name: served\nrun_dir: {tmp_path}/run\ntask: tests.train.serve_task:Mean\ntrain: {{num_steps: 100000}}\n"
        "data: {global_batch: 32}\nlog: {every_steps: 2, tensorboard: false}\ncheckpoint: {every_steps: 10}\n"
        f"serve: {{port: {port}, stall_s: 60}}\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    command = [sys.executable, *torchrun, "-m", "distopt.launch", "train", str(config)]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        for each in (port, port + 1):
            wait_for(each, "step", 12)
            assert [ask(each, path) for path in ("/healthz", "/readyz")] == ["ok\n", "ok\n"]
            assert "last progress" in ask(each, "/livez")
            assert metric(each, "rows_per_second") > 0
            assert metric(each, "gradient_norm") > 0
            assert metric(each, "loss_nats") > 0
            assert metric(each, "all_reduce_seconds_total") > 0
            assert metric(each, "all_reduce_bytes_total") > 0
            wait_for(each, "checkpoint_age_seconds", 0)  # it is written while training goes on
            assert metric(each, "checkpoint_age_seconds") < 60
            assert metric(each, "checkpoint_seconds") >= 0
            assert metric(each, "restarts") == metric(each, "skipped_steps_total") == 0
        wait_for(port, "steps_total", metric(port, "steps_total") + 1)
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(timeout=60)
    assert ask(port, "/healthz") == ""
    assert list((tmp_path / "run/checkpoints").glob("step-*")), (tmp_path / "log").read_text()

"""What runs in a pod beside its workers: the probe that a kubelet runs, and process 1."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest

from distopt.launch.worker import health_probe
from distopt.train.monitor import Status
from distopt.train.serve import StatusServer


@pytest.mark.parametrize(("stalled", "expected"), [(timedelta(0), 1), (timedelta(hours=1), 0)])
def test_a_pod_is_alive_unless_its_worker_says_that_it_is_stalled(stalled: timedelta, expected: int) -> None:
    with StatusServer(Status(), port=0, stall=stalled) as server:
        assert health_probe.main(["127.0.0.1", str(server.port)]) == expected
    assert health_probe.main(["127.0.0.1", str(server.port)]) == 0, "its launcher is starting it again"


def test_process_1_of_a_pod_that_is_told_to_stop_ends_with_143_as_its_workers_do() -> None:
    launcher = ["sh", "-c", "trap 'exit 1' TERM; echo up; while :; do sleep 0.1; done"]
    agent = [sys.executable, "-m", "distopt.launch.worker.host_agent", "--", *launcher]
    with subprocess.Popen(agent, stdout=subprocess.PIPE, text=True) as pod:
        assert pod.stdout is not None
        assert pod.stdout.readline() == "up\n"
        pod.terminate()
        assert pod.wait(timeout=30) == 143


def test_a_pod_that_is_there_before_the_first_one_has_an_address_waits_for_it_and_can_be_stopped() -> None:
    agent = [
        sys.executable,
        "-m",
        "distopt.launch.worker.host_agent",
        "--meet",
        "flights-0.invalid:29400",
        "--",
        "echo",
        "started",
    ]
    with subprocess.Popen(agent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as pod:
        assert pod.stderr is not None
        assert pod.stderr.readline() == "agent: waiting for flights-0.invalid:29400: it has no address yet\n"
        pod.terminate()
        assert pod.communicate(timeout=60) == ("", "")
        assert pod.returncode == 143


def test_the_first_pod_starts_its_launcher_once_its_own_name_has_an_address() -> None:
    agent = [
        sys.executable,
        "-m",
        "distopt.launch.worker.host_agent",
        "--meet",
        "localhost:29400",
        "--",
        "echo",
        "started",
    ]
    assert subprocess.run(agent, capture_output=True, text=True, timeout=60, check=True).stdout == "started\n"

"""Elastic runs over hosts: one is lost in the middle, and all data are seen as the global order says."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from distopt.launch.worker.events import Reader
from tests.launch import order_task
from tests.launch.launching import Launched, wait_until

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def order(on_hosts, tmp_path):
    """Starts order_task.py on the three hosts, elastic from one host on."""
    shutil.copy(order_task.__file__, tmp_path)

    def launched(platform: str, num_steps: int) -> Launched:
        pace = "task_args: {seconds_per_step: 0.25}\n"
        text = f"name: run\n{order_task.CONFIG}{pace}train: {{num_steps: {num_steps}}}\nreduce: {{timeout_s: 8}}\n"
        restarts = 9 if platform == "torchrun" else 1  # one loss; a host that comes back is none
        limits = ["launch.min_hosts=1", f"launch.max_restarts={restarts}", "launch.grace_s=3"]
        return on_hosts(platform, [1, 2, 3], *limits, text=text)

    return launched


def worlds(run: Launched) -> list[int]:
    """Returns the numbers of workers of the run's attempts, as rank 0 tells them."""
    headers = [line.split() for line in run.log(0).splitlines() if line.startswith("--- ")]
    return [int(fields[fields.index("of") + 1].rstrip(",")) for fields in headers]


def assert_all_data_seen_in_order(run: Launched, folder: Path, num_steps: int) -> None:
    assert run.wait() == 0, run.everything()
    assert json.loads((folder / "mean.json").read_text()) == pytest.approx(order_task.expected_mean(num_steps), 1e-9)
    # The figure above would notice: one batch left out, or taken twice, moves it further than that.
    assert abs(order_task.expected_mean(num_steps - 1) / order_task.expected_mean(num_steps) - 1) > 1e-6


@pytest.mark.slow
def test_torchrun_loses_a_host_takes_it_back_and_sees_all_data_in_order(order, hosts, tmp_path):
    run = order("torchrun", 100)  # so many that the host is back before they are done
    wait_until(lambda: run.steps() >= 12, "twelve steps by three workers")
    hosts.link(3, "down")
    try:
        wait_until(lambda: 2 in worlds(run) or 1 in worlds(run), "fewer workers", timeout_s=90)
        lost = run.steps()
        wait_until(lambda: run.steps() > lost, "a step by fewer workers", timeout_s=60)
    finally:
        hosts.link(3, "up")
    assert_all_data_seen_in_order(run, tmp_path, 100)
    sizes = worlds(run)
    assert sizes[0] == 3 and min(sizes) < 3 and sizes[-1] == 3, sizes
    assert "dh3 was lost; the run continues" in run.err


@pytest.mark.slow
def test_elastic_horovod_loses_a_host_takes_it_back_and_sees_all_data_in_order(order, hosts, tmp_path):
    run = order("horovodrun", 200)
    wait_until(lambda: run.steps() >= 12, "twelve steps by three workers")
    hosts.link(3, "down")
    try:
        wait_until(lambda: worlds(run) == [3, 2], "two workers", timeout_s=90)
        # For longer than Horovod keeps a host away: without an answer nobody may be made to wait for it.
        wait_until(lambda: run.steps() >= 90, "steps by two workers", timeout_s=60)
        assert worlds(run) == [3, 2]
    finally:
        hosts.link(3, "up")
    assert_all_data_seen_in_order(run, tmp_path, 200)
    assert worlds(run) == [3, 2, 3]
    assert "dh3 was lost; it joins again when it answers" in run.err and "a lost host is back" in run.err
    wait_until(lambda: run.processes() == [], "all processes of the run gone, on the lost host too", timeout_s=40)


@pytest.mark.slow
def test_elastic_horovod_replaces_a_worker_killed_with_9_and_sees_all_data_in_order(order, hosts, tmp_path):
    run = order("horovodrun", 120)
    wait_until(lambda: run.steps() >= 12, "twelve steps by three workers")
    (start,) = (json.loads(line) for line in (run.run_dir / "logs/rank-2.jsonl").read_text().splitlines())
    os.kill(psutil.Process(start["pid"]).children()[0].pid, signal.SIGKILL)
    assert_all_data_seen_in_order(run, tmp_path, 120)
    assert worlds(run) == [3, 2, 3]
    assert "was killed (SIGKILL)" in run.err
    ends = [event for event in Reader(run.run_dir, from_start=True).new() if event.status == 0]
    assert sorted((event.rank, event.attempt) for event in ends) == [(0, 2), (1, 2), (2, 2)]

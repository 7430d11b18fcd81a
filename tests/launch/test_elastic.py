"""Elastic runs over hosts: one is lost in the middle, and all data are seen as the global order says."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.launch import order_task
from tests.launch.launching import Launched, wait_until

NUM_STEPS = 60

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def order(on_hosts, tmp_path):
    """Starts order_task.py on the three hosts, elastic from one host on."""
    shutil.copy(order_task.__file__, tmp_path)
    pace = "task_args: {seconds_per_step: 0.25}\n"
    text = f"name: run\n{order_task.CONFIG}{pace}train: {{num_steps: {NUM_STEPS}}}\nreduce: {{timeout_s: 8}}\n"

    def launched(platform: str) -> Launched:
        limits = ["launch.min_hosts=1", "launch.max_restarts=9", "launch.grace_s=3"]
        return on_hosts(platform, [1, 2, 3], *limits, text=text)

    return launched


def worlds(run: Launched) -> list[int]:
    """Returns the numbers of workers of the run's attempts, as rank 0 tells them."""
    headers = [line.split() for line in run.log(0).splitlines() if line.startswith("--- ")]
    return [int(words[words.index("of") + 1].rstrip(",")) for words in headers]


def assert_all_data_seen_in_order(run: Launched, folder: Path) -> None:
    assert run.wait() == 0, run.everything()
    assert json.loads((folder / "mean.json").read_text()) == pytest.approx(order_task.expected_mean(NUM_STEPS), 1e-9)
    # The figure above would notice: one batch left out, or taken twice, moves it further than that.
    assert abs(order_task.expected_mean(NUM_STEPS - 1) / order_task.expected_mean(NUM_STEPS) - 1) > 1e-6


@pytest.mark.slow
def test_torchrun_loses_a_host_takes_it_back_and_sees_all_data_in_order(order, hosts, tmp_path):
    run = order("torchrun")
    wait_until(lambda: run.steps() >= 12, "twelve steps by three workers")
    hosts.link(3, "down")
    try:
        wait_until(lambda: 2 in worlds(run) or 1 in worlds(run), "fewer workers", timeout_s=90)
        lost = run.steps()
        wait_until(lambda: run.steps() > lost, "a step by fewer workers", timeout_s=60)
    finally:
        hosts.link(3, "up")
    assert_all_data_seen_in_order(run, tmp_path)
    found = worlds(run)
    assert found[0] == 3 and min(found) < 3 and found[-1] == 3, found
    assert "dh3 was lost; the run goes on" in run.err


@pytest.mark.slow
def test_elastic_horovod_loses_a_host_whose_link_is_cut_and_sees_all_data_in_order(order, hosts, tmp_path):
    run = order("horovodrun")
    wait_until(lambda: run.steps() >= 12, "twelve steps by three workers")
    hosts.link(3, "down")
    try:
        assert_all_data_seen_in_order(run, tmp_path)
    finally:
        hosts.link(3, "up")
    assert worlds(run) == [3, 2]


def test_elastic_horovod_loses_a_worker_killed_with_9_and_sees_all_data_in_order(order, hosts, tmp_path):
    run = order("horovodrun")
    wait_until(lambda: run.steps() >= 12, "twelve steps by three workers")
    (start,) = (json.loads(line) for line in (run.run_dir / "logs/rank-2.jsonl").read_text().splitlines())
    os.kill(psutil.Process(start["pid"]).children()[0].pid, signal.SIGKILL)
    assert_all_data_seen_in_order(run, tmp_path)
    assert worlds(run) == [3, 2]
    assert "was killed (SIGKILL)" in run.err

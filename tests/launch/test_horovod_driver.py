"""What Horovod's driver is told of hosts: those that were lost are used again when they answer over ssh."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distopt.launch.worker import horovod_driver
from tests.launch.launching import wait_until

TIMEOUT_S = 30


@pytest.fixture
def ssh(tmp_path, monkeypatch) -> Path:
    """An ssh in place of the run's own: it reaches the hosts whose names are files in its folder."""
    program = tmp_path / "ssh"
    program.write_text(f'#!/bin/sh\ntest "$1 $2 $4" = "-T -- true" && test -e "{tmp_path}/$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(horovod_driver, "RETRY_S", 0.0)
    return tmp_path


def test_lost_host_is_named_again_when_it_answers_and_the_others_are_not_asked(ssh):
    lost: set[str] = set()
    hosts = horovod_driver.ReachableHosts(lambda: {"one.invalid": 1, "two.invalid": 2}, lost.__contains__)
    find = hosts.find_available_hosts_and_slots
    assert find() == {"one.invalid": 1, "two.invalid": 2}
    lost.add("two.invalid")
    assert find() == {"one.invalid": 1}
    wait_until(lambda: hosts._answered == {"two.invalid": False}, "an answer of ssh", TIMEOUT_S)
    assert find() == {"one.invalid": 1}
    (ssh / "two.invalid").touch()
    wait_until(lambda: find() == {"one.invalid": 1, "two.invalid": 2}, "the host back", TIMEOUT_S)
    lost.clear()
    assert find() == {"one.invalid": 1, "two.invalid": 2}
    (ssh / "two.invalid").unlink()
    lost.add("two.invalid")
    assert find() == {"one.invalid": 1}  # what it answered before is no answer now

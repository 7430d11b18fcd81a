"""What Horovod's driver is told of hosts: those that were lost are used again when they answer over ssh."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from distopt.launch.worker import horovod_driver
from tests.launch.launching import wait_until

TIMEOUT_S = 30


@pytest.fixture
def ssh(tmp_path, monkeypatch) -> Path:
    """An ssh in place of the run's own: it reaches the hosts whose names are files in its folder.

    It writes down whom it has asked, and answers when there is no file `held`.
    """
    program = tmp_path / "ssh"
    program.write_text(f"""#!/bin/sh
cd {tmp_path}
test "$1 $2 $4" = "-T -- true" && test -e "$3"
answer=$?
echo "$3" >> asked
while test -e held; do sleep 0.01; done
exit $answer
""")
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
    wait_until(lambda: find() != {"one.invalid": 1} or _asked(ssh) >= 3, "two answers that are no", TIMEOUT_S)
    assert find() == {"one.invalid": 1}
    (ssh / "two.invalid").touch()
    wait_until(lambda: find() == {"one.invalid": 1, "two.invalid": 2}, "the host back", TIMEOUT_S)
    lost.clear()
    assert find() == {"one.invalid": 1, "two.invalid": 2}
    (ssh / "two.invalid").unlink()
    lost.add("two.invalid")
    assert find() == {"one.invalid": 1}  # what it answered before is no answer now


def test_answer_to_an_earlier_loss_is_none_to_the_next_one(ssh):
    lost = {"two.invalid"}
    hosts = horovod_driver.ReachableHosts(lambda: {"one.invalid": 1, "two.invalid": 2}, lost.__contains__)
    find = hosts.find_available_hosts_and_slots
    (ssh / "two.invalid").touch()
    (ssh / "held").touch()
    assert find() == {"one.invalid": 1}
    wait_until(lambda: _asked(ssh) == 1, "ssh asked", TIMEOUT_S)
    lost.clear()
    assert find() == {"one.invalid": 1, "two.invalid": 2}
    (ssh / "two.invalid").unlink()
    lost.add("two.invalid")
    assert find() == {"one.invalid": 1}
    wait_until(lambda: _asked(ssh) == 2, "ssh asked again", TIMEOUT_S)
    asking = {thread for thread in threading.enumerate() if thread.name.startswith("two.invalid")}
    assert len(asking) == 2
    (ssh / "held").unlink()
    for thread in asking:
        thread.join(TIMEOUT_S)
    assert find() == {"one.invalid": 1}


def _asked(ssh: Path) -> int:
    """How many times ssh was asked."""
    return len((ssh / "asked").read_text().split()) if (ssh / "asked").exists() else 0

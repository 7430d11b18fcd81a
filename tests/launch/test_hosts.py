"""Runs over several hosts, emulated by network namespaces with an sshd in each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts, missing
from tests.launch.launching import wait_until, write_config

SCRIPT = Path(__file__).with_name("sum_script.py")
ENGINES = ["torchrun", "horovodrun", "mpirun"]
LIBRARIES = {"torchrun": "torch_dist", "horovodrun": "horovod"}

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    lacking = missing()
    if lacking:
        pytest.skip(lacking)
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as network:
        yield network


@pytest.fixture
def on_hosts(hosts, start, tmp_path):
    """Starts a run from host 1 over some of the hosts."""

    def launched(platform: str, numbers: list[int], *args: str, seconds: float = 0.0, **options):
        if platform == "horovodrun" and find_spec("horovod") is None:
            pytest.skip("Horovod is not installed (make setup-dev builds it)")
        write_config(tmp_path)
        names = ",".join(hosts.names[number - 1] for number in numbers)
        keys = f"launch.ssh={{config: {hosts.folder}/ssh_config, known_hosts: {hosts.folder}/known_host}}"
        places = [f"launch.platform={platform}", f"launch.hosts=[{names}]", "launch.workers=1", keys]
        script = [f"script={SCRIPT}", f"script_args=['{seconds}']"]
        return start(*script, *places, *args, prefix=hosts.run(1), **options)

    return launched


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("platform", ENGINES)
def test_one_yaml_runs_on_hosts_through_each_engine(platform, count, hosts, on_hosts, tmp_path):
    run = on_hosts(platform, list(range(1, count + 1)))
    assert run.wait() == 0, run.everything()
    found = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(count)]
    assert [one["total"] for one in found] == [count] * count
    assert sorted(one["host"] for one in found) == hosts.names[:count]
    assert {one["library"] for one in found} == {LIBRARIES.get(platform, found[0]["library"])}
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ENGINES)
def test_host_cut_off_ends_the_run_everywhere_and_is_named(platform, hosts, on_hosts, tmp_path):
    run = on_hosts(platform, [1, 2], "reduce.timeout_s=10", "launch.grace_s=3", seconds=600.0)
    wait_until(lambda: len(list(tmp_path.glob("summed-2-*"))) == 2, "both ranks at work")
    hosts.link(2, "down")
    try:
        assert run.wait() == 1
        # The folder is shared in this emulation also by a host that is cut off; a link of its own is what it lacks.
        wait_until(lambda: run.processes() == [], "all processes of the run gone, on the lost host too", timeout_s=40)
    finally:
        hosts.link(2, "up")
    assert "dh2" in run.err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_elastic_torchrun_goes_on_without_a_lost_host_and_takes_it_back(hosts, on_hosts, tmp_path):
    run = on_hosts(
        "torchrun", [1, 2, 3], "launch.min_hosts=1", "launch.max_restarts=9", "launch.grace_s=3", seconds=600.0,
        env={"SUM_TIMEOUT_S": "8"},
    )  # fmt: skip
    wait_until(lambda: len(list(tmp_path.glob("summed-3-*"))) == 3, "three ranks at work")
    hosts.link(3, "down")
    try:
        wait_until(lambda: (tmp_path / "summed-2-1").exists(), "two ranks at work", timeout_s=90)
    finally:
        hosts.link(3, "up")
    for mark in tmp_path.glob("summed-3-*"):
        mark.unlink()
    wait_until(lambda: len(list(tmp_path.glob("summed-3-*"))) == 3, "three ranks at work again", timeout_s=90)
    assert "dh3 was lost; the run goes on" in run.err


@pytest.mark.parametrize(
    ("numbers", "settings", "said"),
    [
        ([1, 2], "known_other", "REMOTE HOST IDENTIFICATION HAS CHANGED"),
        ([1, 2], "no_file", "launch.hosts: dh2 cannot be reached: "),
    ],
    ids=["changed host key", "no host key"],
)
def test_host_with_a_wrong_key_is_refused_and_nothing_runs_there(numbers, settings, said, hosts, on_hosts, tmp_path):
    keys = f"launch.ssh={{config: {hosts.folder}/ssh_config, known_hosts: {hosts.folder}/{settings}}}"
    run = on_hosts("torchrun", numbers, keys)
    assert run.wait() == 2
    assert said in run.err
    assert not run.run_dir.exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("10.88.0.77", "launch.hosts: 10.88.0.77 cannot be reached: ssh: connect to host 10.88.0.77 port 22: "),
        ("nosuchhost", "launch.hosts: nosuchhost resolves to no address here"),
        ("127.0.1.1", "launch.hosts: 127.0.1.1 resolves to 127.0.1.1, where no other host reaches it"),
    ],
)
def test_host_that_cannot_be_reached_is_named_within_the_timeout(address, said, hosts, on_hosts):
    run = on_hosts("horovodrun", [1], f"launch.hosts=[dh1, {address}]")
    assert run.wait() == 2
    assert said in run.err


def test_host_that_accepts_and_says_nothing_is_named_within_the_timeout(hosts, on_hosts):
    code = (
        "import socket\n"
        "server = socket.create_server(('10.88.0.1', 2222))\n"
        "print('listening', flush=True)\n"
        "kept = server.accept()\n"
        "input()"
    )
    with subprocess.Popen(
        hosts.run(1, sys.executable, "-c", code), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as mute:
        assert mute.stdout.readline()
        config = hosts.folder / "mute_config"
        config.write_text((hosts.folder / "ssh_config").read_text() + "Host dh2\n  HostName 10.88.0.1\n  Port 2222\n")
        keys = f"launch.ssh={{config: {config}, connect_timeout_s: 3}}"
        run = on_hosts("mpirun", [1, 2], keys)
        assert run.wait() == 2
        mute.kill()
    assert "launch.hosts: dh2 cannot be reached: " in run.err

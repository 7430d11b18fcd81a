"""Runs over several hosts, emulated by network namespaces with an sshd in each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.launch.jobs import FollowedJob
from tests.launch.launching import wait_until

ENGINES = ["torchrun", "horovodrun", "horovodrun --mpi", "mpirun"]
LIBRARIES = {"torchrun": "torch_dist", "horovodrun": "horovod", "horovodrun --mpi": "horovod"}

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "platform",
    ["torchrun", *(pytest.param(each, marks=pytest.mark.slow) for each in ENGINES[1:])],
)
def test_one_yaml_runs_on_hosts_through_each_engine(platform, count, hosts, on_hosts, tmp_path):
    env = {"MY_API_TOKEN": "s3cret", "OTHER_TOKEN": "s3cret"}
    run = on_hosts(platform, list(range(1, count + 1)), "launch.secrets=[MY_API_TOKEN]", env=env)
    wait_until(lambda: len(list(tmp_path.glob("summed-*"))) > 0 or run.process.poll() is not None, "a rank at work")
    shown = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"s3cret" in command for command in shown)
    assert run.wait() == 0, run.everything()
    assert not any(b"s3cret" in path.read_bytes() for path in run.run_dir.rglob("*") if path.is_file())
    sums = [json.loads((tmp_path / f"sum-{rank}.json").read_text()) for rank in range(count)]
    assert [(one["total"], one["secret"]) for one in sums] == [(count, "s3cret")] * count
    assert sorted(one["host"] for one in sums) == hosts.names[:count]
    assert {one["library"] for one in sums} == {LIBRARIES.get(platform, sums[0]["library"])}
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[1, 2], [2, 3]], ids=["another", "leading"])
@pytest.mark.parametrize("platform", ENGINES)
def test_host_cut_off_ends_the_run_everywhere_and_is_named(platform, numbers, hosts, on_hosts, tmp_path):
    run = on_hosts(platform, numbers, "reduce.timeout_s=10", "launch.grace_s=3", seconds=600.0)
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
@pytest.mark.parametrize("platform", ENGINES)
def test_connections_that_are_reset_end_the_run_and_a_rank_is_named(platform, hosts, on_hosts, tmp_path):
    run = on_hosts(platform, [1, 2], "reduce.timeout_s=10", "launch.grace_s=3", seconds=600.0)
    wait_until(lambda: len(list(tmp_path.glob("summed-2-*"))) == 2, "both ranks at work")
    hosts.reset_connections(2)
    assert run.wait() == 1, run.everything()
    assert re.search(r"rank [01] on dh[12]", run.err), run.everything()
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=40)


@pytest.mark.parametrize(
    ("numbers", "settings", "message"),
    [
        ([1, 2], "known_other", "REMOTE HOST IDENTIFICATION HAS CHANGED"),
        ([1, 2], "no_file", "launch.hosts: dh2 cannot be reached: "),
    ],
    ids=["changed host key", "no host key"],
)
def test_host_with_a_wrong_key_is_refused_and_nothing_runs_there(numbers, settings, message, hosts, on_hosts, tmp_path):
    keys = f"launch.ssh={{config: {hosts.folder}/ssh_config, known_hosts: {hosts.folder}/{settings}}}"
    run = on_hosts("torchrun", numbers, keys)
    assert run.wait() == 2
    assert message in run.err
    assert not run.run_dir.exists()


@pytest.mark.parametrize("lacks", ["files", "interpreter"])
def test_host_that_does_not_share_the_folder_or_has_no_python_is_refused(lacks, hosts, on_hosts, tmp_path):
    hidden = {"files": tmp_path, "interpreter": Path(sys.executable).parent}[lacks]
    config = hosts.folder / "odd_config"
    config.write_text("Host dh2\n  Port 2222\nHost *\n" + (hosts.folder / "ssh_config").read_text())
    with hosts.odd_sshd(2, 2222, hidden):
        run = on_hosts("torchrun", [1, 2], f"launch.ssh={{config: {config}, known_hosts: {hosts.folder}/known_host}}")
        assert run.wait() == 2
    if lacks == "files":
        assert "launch.hosts: dh2 does not see runs/run/launch.json, which is here" in run.err
        assert FollowedJob(run.run_dir).state().detail == "exit status 2"
    else:
        assert (
            f"launch.hosts: dh2 has no {sys.executable}; install distopt there at the same path, or share it" in run.err
        )
        assert not run.run_dir.exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("10.88.0.77", "launch.hosts: 10.88.0.77 cannot be reached: ssh: connect to host 10.88.0.77 port 22: "),
        ("nosuchhost", "launch.hosts: nosuchhost resolves to no address here"),
        ("127.0.1.1", "launch.hosts: 127.0.1.1 resolves to 127.0.1.1, where no other host reaches it"),
    ],
)
def test_host_that_cannot_be_reached_is_named_within_the_timeout(address, message, hosts, on_hosts):
    run = on_hosts("horovodrun", [1], f"launch.hosts=[dh1, {address}]")
    assert run.wait() == 2
    assert message in run.err


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

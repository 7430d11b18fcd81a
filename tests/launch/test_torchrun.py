"""torchrun's command lines: on this machine, and on each of several hosts."""

from __future__ import annotations

import os
import shlex
import sys

import pytest

from distopt.config import parse_config
from distopt.launch.platforms.torchrun import TorchrunPlatform, torchrun_argv

TASK = "name: run\ntask: distopt.examples.flights:Flights\nlaunch: {platform: torchrun}\n"
HOSTS = "launch.hosts=[203.0.113.1,203.0.113.2]"  # addresses that documentation may use, so none is this machine


def option(argv: list[str], name: str) -> str:
    (value,) = [argument.partition("=")[2] for argument in argv if argument.startswith(f"--{name}=")]
    return value


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_backend_of_another_launcher_is_refused(backend):
    (finding,) = TorchrunPlatform().check(parse_config(TASK, [f"reduce.backend={backend}"]))
    assert (finding.subject, finding.message.startswith(f"found {backend}, but torchrun")) == ("reduce.backend", True)


def test_workers_of_one_machine_meet_in_a_file_unless_a_port_is_named():
    (in_file,) = TorchrunPlatform().plan(parse_config(TASK)).commands
    assert option(list(in_file.argv), "rdzv-endpoint").endswith("runs/run/rendezvous")
    plan = TorchrunPlatform().plan(parse_config(TASK, ["launch.port=29501"]))
    assert option(list(plan.commands[0].argv), "rdzv-endpoint") == "127.0.0.1:29501"
    assert not [path for path in plan.files if path.name == "rendezvous"]


def test_each_host_gets_an_agent_over_ssh_in_the_same_folder_and_the_first_one_hosts_the_rendezvous():
    plan = TorchrunPlatform().plan(parse_config(TASK, [HOSTS, "launch.min_hosts=1"]))
    assert (plan.heartbeat, plan.min_hosts, [command.host for command in plan.commands]) == (
        True, 1, ["203.0.113.1", "203.0.113.2"],
    )  # fmt: skip
    for index, command in enumerate(plan.commands):
        there = shlex.split(command.argv[-1])
        assert there[:3] == ["env", "-C", os.getcwd()]
        assert "DISTOPT_HEARTBEAT=1" in there
        assert option(there, "nnodes") == "1:2"
        assert option(there, "rdzv-endpoint") == "203.0.113.1:29400"
        assert option(there, "rdzv-conf") == f"is_host={int(index == 0)}"
        assert option(there, "local-addr") == command.host


@pytest.mark.parametrize("old", ["2.10.1", "2.11.0+cu130"])
def test_torchrun_without_a_shutdown_timeout_is_not_given_one_and_a_longer_grace_time_is_said_to_be_cut(
    old, monkeypatch
):
    monkeypatch.setattr("distopt.launch.platforms.torchrun.version", lambda name: old)
    config = parse_config(TASK, ["launch.grace_s=60"])
    assert not [option for option in torchrun_argv(config, ["--nnodes=1"]) if "shutdown" in option]
    (finding,) = TorchrunPlatform().check(config)
    assert (finding.subject, finding.severity) == ("launch.grace_s", "warning")
    assert not [*TorchrunPlatform().check(parse_config(TASK, ["launch.grace_s=30"]))]


def test_shutdown_waits_longer_than_the_supervisors_so_that_they_kill_first():
    config = parse_config(TASK, ["launch.grace_s=12"])
    argv = torchrun_argv(config, ["--nnodes=1"], worker=["worker", "--option"])
    assert argv[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert option(argv, "shutdown-timeout") == "17"
    assert argv[argv.index("--") + 1 :] == ["worker", "--option"]

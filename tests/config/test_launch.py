"""The `launch` section: hosts and their number, values that become arguments, secrets."""

from __future__ import annotations

import typing

import pytest

from distopt.config import ConfigError, LaunchConfig, parse_config
from distopt.config.launch import read_hostfile
from distopt.launch.platforms import PLATFORMS

MINIMAL = "name: flights\ntask: distopt.examples.flights:Flights\n"


def test_hosts_are_read_from_a_hostfile_and_recorded(tmp_path):
    (tmp_path / "hosts").write_text("# ours\nnode1 slots=2 max_slots=4\n\nnode2:2  # new\n10.0.0.3\n")
    config = parse_config(MINIMAL, [f"launch.hostfile={tmp_path}/hosts", "launch.workers=2"])
    assert (config.launch.hosts, config.launch.hostfile) == (["node1", "node2", "10.0.0.3"], None)


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("node1 slots=2", "launch.workers=3", "launch: workers: found 3, but node1 has 2 slots in "),
        ("node1 two", "launch.workers=1", "hosts:1: found 'node1 two', expected `name`, `name:4` or `name slots=4`"),
        ("# none", "launch.workers=1", "names no host"),
        ("node1", "launch.hosts=[a]", "hostfile: found hosts too; give one of them"),
        ("-oProxyCommand=x", "launch.workers=1", "launch.hosts.0: found '-oProxyCommand=x'"),
    ],
)
def test_hostfile_that_cannot_be_meant_is_refused(text, override, expected, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError) as refused:
        parse_config(MINIMAL, [f"launch.hostfile={tmp_path}/hosts", override])
    (problem,) = refused.value.problems
    assert expected in problem


def test_hostfile_without_slots_says_so(tmp_path):
    (tmp_path / "hosts").write_text("node1\nnode2 port=22 slots=8\n")
    assert read_hostfile(tmp_path / "hosts") == {"node1": None, "node2": 8}


@pytest.mark.parametrize(
    ("overrides", "hosts", "workers"),
    [
        ([], [1], [1]),
        (["nodes=4"], [4], [8]),
        (["hosts=[a, b, c]", "min_hosts=2"], [2, 3], [4, 6]),
        (["nodes=3", "min_hosts=1"], [1, 2, 3], [2, 4, 6]),
    ],
)
def test_world_of_a_run_changes_by_whole_hosts(overrides, hosts, workers):
    workers_each = 1 if not overrides else 2
    launch = parse_config(MINIMAL, [f"launch.workers={workers_each}", *(f"launch.{each}" for each in overrides)]).launch
    assert (list(launch.host_counts), list(launch.world_sizes)) == (hosts, workers)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.hosts=[a, a]"], "hosts: a host is named twice"),
        (["launch.hosts=[a, b]", "launch.nodes=3"], "nodes: found 3, but 2 hosts are named; remove nodes"),
        (["launch.nodes=2", "launch.min_hosts=3"], "min_hosts: found 3, expected at most the number of hosts, 2"),
        (["launch.hosts=['::1']"], "expected the name or the IPv4 address of a host; IPv6 is not used"),
        (["launch.hosts=['[fe80::1]']"], "launch.hosts.0: found '[fe80::1]'"),
        (["launch.hosts=[a..b, c]"], "launch.hosts.0: found 'a..b'"),
        ([f"launch.hosts=[{'a' * 64}.org]"], "launch.hosts.0: found 'aaa"),
        (["launch.secrets=['A B']"], "an entry is not the name of an environment variable"),
        (["launch.env={'A B': x}"], "'A B' is not the name of an environment variable"),
        (["launch.slurm={partition: --wrap=x}"], "launch.slurm.partition: found '--wrap=x'"),
        (["launch.kubernetes={memory: 1 Gi}"], "launch.kubernetes.memory: found '1 Gi'"),
    ],
)
def test_what_does_not_agree_or_could_be_an_option_is_refused(overrides, message):
    with pytest.raises(ConfigError) as refused:
        parse_config(MINIMAL, overrides)
    assert message in str(refused.value)


def test_platforms_of_the_yaml_are_those_of_the_launcher():
    names, _ = typing.get_args(LaunchConfig.model_fields["platform"].annotation)
    assert typing.get_args(names) == tuple(PLATFORMS)

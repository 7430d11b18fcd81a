"""How other hosts are reached: the options of ssh, commands with any arguments, and hosts that do not fit."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.config import parse_config
from distopt.launch import ssh
from tests.launch.launching import wait_until

BASE = "name: run\nscript: train.py\n"
TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=200)


def config(*overrides: str):
    return parse_config(BASE, list(overrides))


@given(st.lists(TEXT, min_size=1, max_size=5))
def test_arguments_arrive_at_another_host_unchanged(argv):
    *_, dashes, host, command = ssh.remote(config(), "dh1", argv)
    assert (dashes, host, shlex.split(command)) == ("--", "dh1", argv)


def option(options: list[str], name: str) -> list[str]:
    return [each.partition("=")[2] for each in options if each.startswith(f"{name}=")]


def test_new_hosts_are_accepted_once_and_named_keys_are_the_only_ones():
    assert option(ssh.options(config()), "StrictHostKeyChecking") == ["accept-new"]
    options = ssh.options(config("launch.ssh={known_hosts: keys, config: conf, connect_timeout_s: 3}"))
    assert options[:2] == ["-F", "conf"]
    assert option(options, "StrictHostKeyChecking") == ["yes"]
    assert option(options, "UserKnownHostsFile") == ["keys"]
    assert option(options, "ConnectTimeout") == ["3"]
    assert option(options, "BatchMode") == ["yes"]  # never asks for a password


@pytest.mark.parametrize("folder", ["plain", "with space", "50%"])
def test_path_of_host_keys_is_read_by_ssh_as_it_is(folder, tmp_path):
    known_hosts = tmp_path / folder / "known_hosts"
    options = ssh.options(config(f'launch.ssh={{known_hosts: "{known_hosts}"}}'.replace("\t", "\\t")))
    shown = subprocess.run([ssh.SSH, "-G", *options, "--", "dh1"], capture_output=True, text=True, timeout=30)
    if shown.returncode == 127 or not os.path.exists(ssh.SSH):
        pytest.skip("there is no ssh (Debian: openssh-client)")
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("userknownhostsfile ")]
    assert line.removeprefix("userknownhostsfile ").strip('"') == str(known_hosts)


def test_wrapper_runs_ssh_with_the_options_of_the_run_before_those_of_a_launcher(tmp_path, monkeypatch):
    run = config(f"run_dir={tmp_path}/run")
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    monkeypatch.setattr(ssh, "SSH", str(echo))
    ((path, text),) = ssh.wrapper(run).items()
    assert path.name == "ssh" and path.parent.name == ssh.FOLDER
    done = subprocess.run(
        ["sh", "-c", text.partition("\n")[2], "ssh", "-o", "a b", "dh1"], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [*ssh.options(run), "-o", "a b", "dh1"]


@pytest.mark.parametrize(
    ("workers", "cores", "more", "refused"),
    [(2, 1, "", False), (3, 2, "", True), (4, 4, "", False), (9, 4, "launch.oversubscribe=true", False)],
)
def test_more_processes_than_cores_are_refused_unless_they_may_share_them(workers, cores, more, refused):
    run = config(f"launch.workers={workers}", *filter(None, [more]))
    assert bool(list(ssh.check_cores(run, "dh1", cores))) == refused


def test_name_that_stands_for_the_wrong_machine_is_refused():
    assert ssh.check_name("127.0.1.1", alone=True) is None
    for name, message in (("127.0.1.1", "where no other host reaches it"), ("nosuch.invalid", "to no address here")):
        finding = ssh.check_name(name, alone=False)
        assert finding is not None and message in finding.message


def fake_ssh(tmp_path, monkeypatch, script: str) -> None:
    """An ssh in place of the real one, for hosts that are hard to get; real ones are in test_hosts.py."""
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    wait_until(program.exists, "the program there", 5)
    monkeypatch.setattr(ssh, "SSH", str(program))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 1", "launch.workers: 4 processes, but 203.0.113.9 has 1 cores; set launch.workers=1"),
        ("exit 3", "has no folder "),
        ("exit 4", "; install distopt there at the same path, or share it"),
        ("echo '@@@@' >&2; echo refused >&2; exit 255", "203.0.113.9 cannot be reached: refused; try `"),
        ("sleep 9", "did not answer within 1 s; try `"),
    ],
)
def test_host_that_does_not_fit_is_named_with_the_fix(script, message, tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, script)
    run = config("launch.workers=4", "launch.platform=torchrun", "launch.hosts=[203.0.113.9]")
    monkeypatch.setattr(ssh, "ANSWER_MARGIN_S", 1 - run.launch.ssh.connect_timeout_s)
    (finding,) = ssh.check_hosts(run)
    assert message in str(finding) and "203.0.113.9" in str(finding)


def test_missing_ssh_is_named(monkeypatch):
    monkeypatch.setattr(ssh, "SSH", "/nosuch/ssh")
    (finding,) = ssh.check_hosts(config("launch.platform=torchrun", "launch.hosts=[203.0.113.9]"))
    assert str(finding) == "launch.hosts: there is no /nosuch/ssh here; install openssh-client"


@pytest.mark.parametrize(("status", "num_findings"), [(0, 0), (1, 1), (255, 0)])
def test_host_that_does_not_see_a_file_does_not_share_the_folder(status, num_findings, tmp_path, monkeypatch):
    fake_ssh(tmp_path, monkeypatch, f"exit {status}")  # 255: a link that broke since is the run's to report
    run = config("launch.platform=torchrun", "launch.hosts=[localhost, 203.0.113.9]")
    findings = ssh.check_folder(run, tmp_path / "launch.json")
    assert len(findings) == num_findings
    assert all("203.0.113.9 does not see" in str(finding) for finding in findings)

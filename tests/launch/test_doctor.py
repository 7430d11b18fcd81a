"""`distopt doctor`: what it finds here is so, and what is broken has the command that mends it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version

from distopt.config import parse_config
from distopt.launch import doctor, network


def run_config(*overrides: str):
    return parse_config("name: run\nscript: train.py\n", overrides)


def test_doctor_finds_what_is_installed_and_that_workers_reach_one_another(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distopt.launch", "doctor", "--json"],
        capture_output=True, text=True, timeout=170, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["subject"]: line for line in json.loads(done.stdout)}
    assert found["pyro-ppl"] == {"subject": "pyro-ppl", "verdict": "ok", "said": version("pyro-ppl"), "mend": ""}
    assert "gloo" in found["torch.distributed"]["said"]
    assert found["all-reduce"]["verdict"] == "ok"


def test_port_in_use_is_a_warning_with_its_mend():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        finding = doctor._port(run_config(f"launch.port={taken.getsockname()[1]}"))
    assert (finding.verdict, finding.mend) == ("warning", "launch.port=29500")


def test_folder_that_cannot_be_written_to_is_a_failure():
    finding = doctor._folder(run_config("run_dir=/proc/runs"))
    assert finding.verdict == "failure"
    assert "choose another run_dir" in str(finding)


def test_host_that_is_this_machine_has_its_clock_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(doctor._host(run_config("launch.hosts=[localhost]"), "localhost"))
    assert [one.verdict for one in found] == ["ok", "ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_host_that_resolves_nowhere_is_a_failure():
    (finding,) = doctor._host(run_config("launch.hosts=[nosuch.invalid]"), "nosuch.invalid")
    assert finding.verdict == "failure" and "resolves to no address" in finding.said


def test_interface_is_the_one_that_has_the_hosts_address():
    assert network.interface_among(["localhost"]) == "lo"
    assert network.interface_among(["203.0.113.9"]) is None

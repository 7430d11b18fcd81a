"""`distopt doctor`: what it finds here is so, and what is broken has the command that fixes it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from distopt.config import parse_config
from distopt.launch import doctor


def run_config(*overrides: str):
    return parse_config("name: run\nscript: train.py\n", overrides)


def test_doctor_finds_what_is_installed_and_that_workers_reach_one_another(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distopt.launch", "doctor", "--json"],
        capture_output=True, text=True, timeout=170, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {line["subject"]: line for line in json.loads(done.stdout)}
    assert findings["pyro-ppl"] == {"subject": "pyro-ppl", "message": version("pyro-ppl"), "fix": "", "severity": "ok"}
    assert "gloo" in findings["torch.distributed"]["message"]
    assert findings["all-reduce"]["severity"] == "ok"


def test_port_in_use_is_a_warning_with_its_fix():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        finding = doctor._port(run_config(f"launch.port={taken.getsockname()[1]}"))
    assert (finding.severity, finding.fix) == ("warning", "launch.port=29500")


def test_folder_that_cannot_be_written_to_is_a_failure():
    finding = doctor._run_dir(run_config("run_dir=/proc/runs"))
    assert finding.severity == "failure"
    assert finding.fix == "choose another run_dir"


def test_host_that_is_this_machine_has_its_clock_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    findings = doctor._hosts(run_config("launch.hosts=[localhost]"))
    assert [one.severity for one in findings] == ["ok"] * 4
    assert list(tmp_path.iterdir()) == []


def test_host_whose_shell_greets_is_understood(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = doctor._run

    def greet(argv, env=None):
        done = run(argv, env)
        done.stdout = f"welcome\n{done.stdout}"
        return done

    monkeypatch.setattr(doctor, "_run", greet)
    assert [one.severity for one in doctor._hosts(run_config("launch.hosts=[localhost]"))] == ["ok"] * 4


def test_host_that_resolves_nowhere_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (finding,) = doctor._hosts(run_config("launch.hosts=[nosuch.invalid]"))
    assert finding.severity == "failure" and "resolves to no address" in finding.message


OF_HOSTS = """
import dataclasses, json
from distopt.config import load_config
from distopt.launch import doctor
config = load_config("run.yaml")
found = doctor._hosts(config)
print(json.dumps([dataclasses.asdict(one) for one in [*found, doctor._all_reduce_over_hosts(config, found)]]))
"""


def examined(hosts, folder: Path, settings: Path, names: str, *command: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Returns the exit status and the findings of doctor on host 1 for a run over `names`."""
    (folder / "run.yaml").write_text(
        f"name: run\nscript: train.py\nlaunch: {{platform: torchrun, hosts: [{names}],"
        f" ssh: {{config: {settings}, known_hosts: {hosts.folder}/known_host, connect_timeout_s: 3}}}}\n"
    )
    done = subprocess.run(
        hosts.run(1, sys.executable, *command), cwd=folder, capture_output=True, text=True, timeout=170
    )
    assert done.stdout, done.stderr
    return done.returncode, {line["subject"]: line for line in json.loads(done.stdout)}


def test_hosts_in_good_order_are_found_so_and_reduce_together(hosts, tmp_path):
    # Without what doctor says of this machine, which takes as long again and has a test of its own above.
    _, findings = examined(hosts, tmp_path, hosts.folder / "ssh_config", "dh1, dh2, dh3", "-c", OF_HOSTS)
    for name in ("dh1", "dh2", "dh3"):
        subjects = (name, f"{name} clock", f"{name} versions", f"{name} folder")
        assert [findings[subject]["severity"] for subject in subjects] == ["ok"] * 4
    done = findings["all-reduce over hosts"]
    assert (done["severity"], done["message"].startswith("3 hosts: ")) == ("ok", True), done


@pytest.mark.slow
def test_host_with_another_clock_and_folder_and_one_out_of_reach_are_failures(hosts, tmp_path):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is missing (Debian: faketime)")
    settings = hosts.folder / "odd_config"
    settings.write_text("Host dh2\n  Port 2222\nHost *\n" + (hosts.folder / "ssh_config").read_text())
    ahead = ["-o", f"SetEnv=LD_PRELOAD={library} FAKETIME=+120s"]  # sessions two minutes ahead
    with hosts.odd_sshd(2, 2222, tmp_path, *ahead):
        command = ["-m", "distopt.launch", "doctor", "run.yaml", "--json"]
        status, findings = examined(hosts, tmp_path, settings, "dh1, dh2, 10.88.0.77", *command)
    assert status == 1
    assert findings["dh2"]["severity"] == "ok"
    assert findings["dh2 clock"]["severity"] == "failure"
    assert 115 < float(findings["dh2 clock"]["message"].removesuffix(" s apart")) < 125
    assert (
        findings["dh2 folder"]["severity"] == "failure" and "not the same folder" in findings["dh2 folder"]["message"]
    )
    assert (
        findings["10.88.0.77"]["severity"] == "failure"
        and "10.88.0.77 cannot be asked" in findings["10.88.0.77"]["message"]
    )
    assert findings["all-reduce over hosts"]["severity"] == "warning"


def test_horovod_that_was_built_for_another_mpi_is_a_warning_with_the_build_that_fixes_it(tmp_path, monkeypatch):
    program = tmp_path / "mpirun"  # what MPICH's says of itself
    program.write_text("#!/bin/sh\nprintf 'HYDRA build details:\\n    Version:      5.0.2\\n'\n")
    program.chmod(0o755)
    monkeypatch.setattr(doctor, "find_mpirun", lambda: str(program))
    monkeypatch.setattr(doctor, "mpi_of_horovod", lambda: "Open MPI")
    finding = doctor._mpi()
    assert (finding.severity, finding.fix) == ("warning", "python tools/build_horovod.py")
    assert finding.message == f"mpirun (MPICH) 5.0.2 at {program}, but Horovod was built for Open MPI"


def test_host_with_other_versions_is_a_failure_that_names_each():
    here = {name: doctor._version(name) for name in doctor._COMPARED}
    python = sys.version.split()[0]
    assert doctor._versions("h", {"python": python, **here}).severity == "ok"
    finding = doctor._versions("h", {"python": python, **here, "torch": "2.0.0", "pyro-ppl": None})
    assert (finding.subject, finding.severity) == ("h versions", "failure")
    assert finding.message == (
        f"torch 2.0.0 there, {here['torch']} here; pyro-ppl not installed there, {here['pyro-ppl']} here"
    )

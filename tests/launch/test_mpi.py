"""Which MPI is here, and which one Horovod was built for."""

from __future__ import annotations

from pathlib import Path

import pytest

from distopt.config import parse_config
from distopt.launch.platforms.mpi import is_mpich, mpi_of_horovod, open_mpi_env, secret_variables

TASK = "name: run\ntask: distopt.examples.flights:Flights\n"


def test_mpi_of_horovod_is_the_one_that_its_library_loads():
    hvd = pytest.importorskip("horovod.torch", reason="Horovod is not installed (make setup-dev builds it)")
    loaded = {"libmpi.so.40": "Open MPI", "libmpi.so.12": "MPICH"}
    maps = Path("/proc/self/maps").read_text()
    families = [family for name, family in loaded.items() if name in maps] if hvd.mpi_built() else ["none"]
    assert [mpi_of_horovod()] == families


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("mpirun (Open MPI) 5.0.11", False),
        ("HYDRA build details:\n    Version:      5.0.2", True),
        ("Intel(R) MPI Library for Linux* OS, MPICH compatible", True),
    ],
)
def test_family_of_an_mpirun_is_told_by_what_it_says_of_itself(version, expected, tmp_path):
    program = tmp_path / "mpirun"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{version}\nEND\n")
    program.chmod(0o755)
    assert is_mpich(str(program)) is expected


def test_program_that_is_not_there_is_not_mpich(tmp_path):
    assert is_mpich(str(tmp_path / "mpirun")) is False


def test_open_mpi_listens_nowhere_on_this_machine_and_reaches_hosts_by_the_ssh_of_the_run(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert open_mpi_env(parse_config(TASK)) == {"OMPI_MCA_btl": "^tcp"}
    env = open_mpi_env(parse_config(TASK, ["launch.hosts=[203.0.113.1]", "launch.interface=eth1"]))
    agent = str(Path("runs/run/ssh/ssh").resolve())
    assert (env["OMPI_MCA_plm_rsh_agent"], env["PRTE_MCA_plm_ssh_agent"]) == (agent, agent)
    assert env["OMPI_MCA_btl_tcp_if_include"] == "eth1"


def test_variables_that_look_like_secrets_and_those_that_are_named_are_hidden(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "x")
    hidden = secret_variables(parse_config(TASK, ["launch.secrets=[PLAIN]"]))
    assert {"SOME_API_KEY", "PLAIN"} <= hidden
    assert "PATH" not in hidden

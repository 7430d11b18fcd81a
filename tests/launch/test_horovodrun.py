"""horovodrun: what is refused before it starts, and what its plan keeps from it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from distopt.config import parse_config
from distopt.launch.platforms import horovodrun

TASK = "name: run\ntask: distopt.examples.flights:Flights\nlaunch: {platform: horovodrun}\n"
HOSTS = "launch.hosts=[203.0.113.1,203.0.113.2]"


def test_horovod_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(horovodrun, "find_spec", lambda name: None)
    findings = horovodrun.HorovodrunPlatform().check_machine(parse_config(TASK, ["reduce.backend=horovod"]))
    assert "Horovod was chosen, but it is not installed for " in "".join(map(str, findings))


def test_horovodrun_over_mpich_is_refused_with_what_starts_it(pretended_mpi):
    pretended_mpi("MPICH", "MPICH")
    problems = horovodrun.HorovodrunPlatform().check_machine(
        parse_config(TASK, ["launch.platform=horovodrun", "launch.horovod_controller=mpi"])
    )
    assert "set launch.platform=mpirun, which starts Horovod over MPICH" in "".join(map(str, problems))


@pytest.mark.parametrize(
    ("mpirun_of", "horovod_for", "message"),
    [("Open MPI", "none", "Horovod was built without it"), ("Open MPI", "Open MPI", "")],
)
def test_mpi_controller_needs_a_horovod_that_was_built_with_mpi(mpirun_of, horovod_for, message, pretended_mpi):
    pretended_mpi(mpirun_of, horovod_for)
    config = parse_config(TASK, ["launch.horovod_controller=mpi"])
    every = horovodrun.HorovodrunPlatform().check_machine(config)
    findings = [finding for finding in every if "controller" in finding.subject]
    assert (len(findings), message in "".join(map(str, findings))) == (int(bool(message)), True)


def test_run_that_is_elastic_needs_several_hosts_and_the_gloo_controller():
    chosen = ["launch.hosts=[localhost]", "launch.min_hosts=1", "launch.horovod_controller=mpi"]
    text = "\n".join(map(str, horovodrun.HorovodrunPlatform().check(parse_config(TASK, chosen))))
    assert "launch.min_hosts: elastic Horovod cannot survive the failure of its only host; name two" in text
    assert "only with its Gloo controller; set launch.horovod_controller=gloo" in text


def test_plan_keeps_secrets_from_horovodrun_which_puts_its_environment_on_command_lines(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "s3cret")
    plan = horovodrun.HorovodrunPlatform().plan(parse_config(TASK))
    (command,) = plan.commands
    assert "HUB_TOKEN" in command.argv[command.argv.index("--hidden") + 1].split(",")
    assert "--secrets" not in command.argv
    assert "s3cret" not in str(plan)
    (command,) = horovodrun.HorovodrunPlatform().plan(parse_config(TASK, [HOSTS, "launch.secrets=[PLAIN]"])).commands
    assert command.argv[command.argv.index("--secrets") + 1] == "PLAIN"
    assert plan.stop_by_file and plan.ends_together


def test_ssh_of_the_run_comes_first_on_its_path_and_the_mpirun_of_this_python_next():
    config = parse_config(TASK, [HOSTS, "launch.horovod_controller=mpi"])
    (command,) = horovodrun.HorovodrunPlatform().plan(config).commands
    first, second, *_ = command.env["PATH"].split(os.pathsep)
    assert Path(first) == Path("runs/run/ssh").resolve()
    assert (Path(second) / "python").exists()


def test_script_that_lists_hosts_prints_each_with_its_slots(tmp_path):
    config = parse_config(TASK, [HOSTS, "launch.min_hosts=1", "launch.workers=2"])
    plan = horovodrun.HorovodrunPlatform().plan(config)
    (text,) = [text for path, text in plan.files.items() if path.name == "hosts.sh"]
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "203.0.113.1:2\n203.0.113.2:2\n"
    assert not plan.ends_together  # horovodrun starts workers again

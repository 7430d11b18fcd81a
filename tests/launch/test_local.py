"""This machine: the launcher follows from the backend."""

from __future__ import annotations

import pytest

from distopt.config import parse_config
from distopt.launch.jobs import FollowedJob
from distopt.launch.platforms.local import LocalPlatform
from tests.launch.launching import wait_until, write_config

TASK = "name: run\ntask: distopt.examples.flights:Flights\n"


@pytest.mark.parametrize(
    ("backend", "launcher"),
    [
        ("auto", "torchrun"),
        ("torch_dist", "torchrun"),
        ("horovod", "horovodrun"),
        ("mpi", "mpirun"),
        ("single", "local"),
        ("mybackends:Mine", "torchrun"),
    ],
)
def test_launcher_is_the_one_of_the_backend(backend, launcher):
    assert LocalPlatform().plan(parse_config(TASK, [f"reduce.backend={backend}"])).platform == launcher


def test_world_of_one_is_one_python_without_a_launcher():
    (command,) = LocalPlatform().plan(parse_config(TASK, ["reduce.backend=single"])).commands
    assert "torch.distributed.run" not in command.argv and "distopt.launch.worker.supervisor" in command.argv


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.hosts=[localhost]"], "launch.hosts: found hosts, but launch.platform is local"),
        (["reduce.backend=single", "launch.workers=2"], "launch.workers: found 2, but reduce.backend is single"),
    ],
)
def test_what_one_machine_cannot_do_is_refused(overrides, message):
    findings = list(LocalPlatform().check(parse_config(TASK, overrides)))
    assert [finding for finding in map(str, findings) if finding.startswith(message)], findings


def test_launcher_adds_what_it_refuses(pretended_mpi):
    pretended_mpi("MPICH", "Open MPI")
    findings = "".join(
        map(str, LocalPlatform().check(parse_config(TASK, ["reduce.backend=mpi", "launch.min_hosts=1"])))
    )
    assert "launch.min_hosts: mpirun cannot continue with fewer hosts" in findings


def test_file_that_announces_the_end_of_this_host_stops_the_run_after_a_checkpoint(start, tmp_path):
    write_config(tmp_path, "wait", launch="preemption_file: preempted")
    run = start()
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    (tmp_path / "preempted").touch()
    assert run.wait() == 143, run.everything()
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert "will be taken away" in run.err
    assert FollowedJob(run.run_dir).state().phase == "stopped"

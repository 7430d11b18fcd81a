"""mpirun: what is refused before it starts, and real runs over MPICH; those over Open MPI are in test_attach.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.config import parse_config
from distopt.launch.platforms import mpirun
from tests.launch.launching import mpich_environment, wait_until, write_config

SUM = Path(__file__).with_name("sum_script.py")
BUILD_HOROVOD = Path(__file__).parents[2] / "tools" / "build_horovod.py"
OVER_MPI = ["reduce.backend=mpi", "launch.env={SUM_BACKEND: mpi}"]  # not Horovod, which was built for Open MPI

TASK = "name: run\ntask: distopt.examples.flights:Flights\n"

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("mpirun_of", "horovod_for", "backend", "message"),
    [
        ("Open MPI", None, "horovod", "uses Horovod, but it is not installed; `python tools/build_horovod.py`"),
        ("Open MPI", "none", "horovod", "uses Horovod, but it was built without MPI"),
        ("MPICH", "Open MPI", "horovod", "built for Open MPI, and mpirun is MPICH's; `python tools/build_"),
        ("MPICH", "Open MPI", "auto", "auto uses Horovod, but it was built for Open MPI"),
        ("Open MPI", "MPICH", "auto", "auto uses Horovod, but it was built for MPICH"),
        ("Open MPI", "Open MPI", "horovod", ""),
        ("MPICH", "MPICH", "auto", ""),
        ("MPICH", "Open MPI", "mpi", ""),
    ],
)
def test_library_of_another_mpi_than_mpirun_is_refused(mpirun_of, horovod_for, backend, message, pretended_mpi):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (make setup-dev)")
    pretended_mpi(mpirun_of, horovod_for)
    config = parse_config(TASK, ["launch.platform=mpirun", f"reduce.backend={backend}"])
    result = list(mpirun.MpirunPlatform().check_machine(config))
    assert (len(result), message in "".join(map(str, result))) == (int(bool(message)), True), result


def test_mpi4py_that_is_missing_is_refused(pretended_mpi, monkeypatch):
    pretended_mpi("MPICH", None)
    monkeypatch.setattr(mpirun, "find_spec", lambda name: None)
    (message,) = mpirun.MpirunPlatform().check_machine(parse_config(TASK, ["launch.platform=mpirun"]))
    assert "auto uses mpi4py, which is not installed; `pip install 'distopt[mpi]'`" in str(message)


# MPICH in place of Open MPI.


@pytest.fixture(scope="module")
def mpich(tmp_path_factory) -> str:
    """Returns a Python beside MPICH's mpirun."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed (make setup-dev)")
    return str(mpich_environment(tmp_path_factory.mktemp("mpich")))


@pytest.fixture(scope="module")
def mpich_horovod(tmp_path_factory) -> str:
    """Returns a Python beside MPICH's mpirun that has a Horovod built for it, in minutes where none is kept."""
    python = mpich_environment(tmp_path_factory.mktemp("mpich-horovod"))
    path = f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"  # cmake is in the outer one
    env = {**os.environ, "PATH": path}
    done = subprocess.run([python, BUILD_HOROVOD], env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(python)


def assert_summed(folder: Path, library: str = "mpi", hosts: set[str] | None = None) -> None:
    result = [json.loads((folder / f"sum-{rank}.json").read_text()) for rank in range(2)]
    assert [(one["total"], one["library"]) for one in result] == [(2, library)] * 2
    assert hosts is None or {one["host"] for one in result} == hosts


@pytest.mark.slow
def test_run_on_this_machine_ends_well(mpich, start, tmp_path):
    write_config(tmp_path, more="reduce: {backend: mpi}")
    run = start(f"script={SUM}", "script_args=['0']", *OVER_MPI, python=mpich)
    assert run.wait() == 0, run.everything()
    assert_summed(tmp_path)
    assert "-bind-to none" in (run.run_dir / "launch.json").read_text()
    assert run.processes() == []


@pytest.mark.slow
def test_library_of_another_mpi_is_refused_since_its_world_falls_apart(mpich, start, tmp_path):
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (make setup-dev builds it)")
    write_config(tmp_path, more="reduce: {backend: mpi}")
    run = start(f"script={SUM}", "script_args=['0']", "launch.env={SUM_BACKEND: horovod}", python=mpich)
    assert run.wait() == 1
    assert "mpirun (MPICH) started 2 workers, but this one is in a world of 1 over horovod" in run.err


@pytest.mark.slow
def test_signal_reaches_each_worker_once_and_all_save_and_end(mpich, start, tmp_path):
    write_config(tmp_path, "wait", more="reduce: {backend: mpi}")
    run = start(python=mpich)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 2, "both workers ready")
    run.signal(signal.SIGTERM)
    assert run.wait() == 143, run.everything()
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert run.processes() == []


@pytest.mark.slow
def test_worker_that_is_killed_is_named(mpich, start, tmp_path):
    write_config(tmp_path, "kill", "1", "9", more="reduce: {backend: mpi}")
    run = start(python=mpich)
    assert run.wait() == 1
    assert "rank 1 on" in run.err.split("died first")[0] and "was killed (SIGKILL)" in run.err
    assert run.processes() == []


@pytest.mark.slow
def test_run_on_hosts_ends_well(mpich, hosts, on_hosts, tmp_path):
    run = on_hosts("mpirun", [1, 2], *OVER_MPI, python=mpich)
    assert run.wait() == 0, run.everything()
    assert_summed(tmp_path, hosts={"dh1", "dh2"})
    wait_until(lambda: run.processes() == [], "all processes of the run gone", timeout_s=20)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # with the build
@pytest.mark.parametrize("backend", ["horovod", "auto"])
def test_horovod_that_was_built_for_it_runs_on_this_machine(backend, mpich_horovod, start, tmp_path):
    write_config(tmp_path)
    chosen = ["launch.platform=mpirun", f"reduce.backend={backend}", f"launch.env={{SUM_BACKEND: {backend}}}"]
    run = start(f"script={SUM}", "script_args=['0']", *chosen, python=mpich_horovod)
    assert run.wait() == 0, run.everything()
    assert_summed(tmp_path, "horovod")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_horovod_that_was_built_for_it_runs_on_hosts(mpich_horovod, hosts, on_hosts, tmp_path):
    run = on_hosts("mpirun", [1, 2], python=mpich_horovod)
    assert run.wait() == 0, run.everything()
    assert_summed(tmp_path, "horovod", {"dh1", "dh2"})

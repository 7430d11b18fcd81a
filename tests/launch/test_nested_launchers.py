"""Launchers inside of a real Slurm job, whose processes have the variables of both: supervisor and worker agree."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.launch.launching import mpich_environment

PYTHON, BIN = sys.executable, Path(sys.executable).parent
MPIRUN = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun -n 4 --bind-to none"
TORCHRUN = "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-id=1 --no-python"
SHOW = """
import json, sys
from dataclasses import asdict
from distopt.launchers import find_rank
print(json.dumps(asdict(find_rank())))
"""

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(240)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "command"),
    [
        ("srun", "srun"),
        pytest.param("srun", "srun --mpi=pmi2", marks=slow, id="srun with PMI-2"),
        ("mpirun (Open MPI)", MPIRUN),
        pytest.param("mpirun (MPICH)", "{mpich}/mpirun -n 4", marks=slow, id="MPICH"),
        pytest.param("horovodrun", "horovodrun --gloo -np 4 -H localhost:4", marks=slow, id="horovodrun"),
        pytest.param(
            "torchrun",
            f"srun --ntasks=2 --ntasks-per-node=1 {PYTHON} {TORCHRUN} --rdzv-endpoint=dh1:29400",
            marks=slow,
            id="torchrun in srun",
        ),
    ],
)
def test_ranks_in_a_slurm_job_are_those_of_the_inner_launcher(launcher, command, cluster, tmp_path, tmp_path_factory):
    if launcher == "horovodrun" and find_spec("horovod") is None:
        pytest.skip("Horovod is not installed (make setup-dev builds it)")
    if "{mpich}" in command:
        command = command.format(mpich=mpich_environment(tmp_path_factory.mktemp("mpich")).parent)
    (tmp_path / "show.py").write_text(SHOW)
    worker = [PYTHON, "-m", "distopt.launch.worker.supervisor", "run", "--", PYTHON, "show.py"]
    job = (
        f'#!/bin/bash\nexport PATH={BIN}:"$PATH" MASTER_ADDR=dh1 RANK=0 WORLD_SIZE=2\n{command} {shlex.join(worker)}\n'
    )
    (tmp_path / "job.sh").write_text(job)  # with variables that are left over from another run

    options = ["--wait", "--nodes=2", "--ntasks-per-node=2", f"--chdir={tmp_path}", f"--output={tmp_path}/job.log"]
    cluster.ask("sbatch", *options, str(tmp_path / "job.sh"))
    logs = [(tmp_path / f"run/logs/rank-{rank}.log") for rank in range(4)]
    assert all(log.exists() for log in logs), (tmp_path / "job.log").read_text()
    for rank, log in enumerate(logs):
        header, shown = log.read_text().splitlines()
        info = json.loads(shown)
        assert f"rank {rank} of 4" in header
        assert (info["launcher"], info["rank"], info["world_size"]) == (launcher, rank, 4)

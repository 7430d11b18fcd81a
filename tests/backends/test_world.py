"""What the backends with peers share: devices, a world that fell apart, and the orderly exit of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distopt.backends import BackendError, current, init
from distopt.backends.single import Single
from distopt.backends.world import World, choose_device, refuse_split_world
from distopt.launchers import RankInfo
from tests import workers


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "local_size", "device"),
    [
        (0, 0, 2, "cpu"),
        (2, 1, 2, "cuda:1"),
        (1, 0, 2, "cpu"),  # all ranks of a host take the same kind of device
        (1, 1, None, "cpu"),
        (2, 1, None, "cuda:1"),
        (1, None, None, "cuda:0"),
    ],
)
def test_rank_gets_a_gpu_where_each_rank_of_its_host_has_one(num_gpus, local_rank, local_size, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_device(RankInfo("a test", 3, 4, local_rank, local_size)) == torch.device(device)


@pytest.mark.parametrize(
    ("variables", "launcher", "device"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, "srun", "cuda:0"),
        ({"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu:a100=1"}, "srun", "cuda:0"),
        ({"SLURM_NTASKS_PER_GPU": "1"}, "srun", "cuda:0"),
        ({"SLURM_GPU_BIND": "verbose,single:1"}, "srun", "cuda:0"),
        ({"SLURM_GPU_BIND": "map:0,1,2,3"}, "srun", "cuda:0"),
        ({"SLURM_GPU_BIND": "map:0,0,1,1"}, "srun", "cpu"),
        ({"SLURM_GPU_BIND": "map_gpu:0*4"}, "srun", "cpu"),
        ({"SLURM_GPU_BIND": "single:2"}, "srun", "cpu"),  # two tasks share one
        ({"SLURM_GPU_BIND": "closest"}, "srun", "cpu"),
        ({"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"}, "srun", "cpu"),
        ({"SLURM_NTASKS_PER_GPU": "2"}, "srun", "cpu"),
        ({"SLURM_TRES_PER_TASK": "cpu=4"}, "srun", "cpu"),
        ({}, "srun", "cpu"),
        ({"SLURM_GPUS_PER_TASK": "1"}, "torchrun", "cpu"),  # the task is torchrun, and its workers share what it has
    ],
)
@pytest.mark.parametrize("local_rank", [0, 1, 3])
def test_task_of_srun_that_sees_its_own_gpu_alone_takes_it(variables, launcher, device, local_rank, monkeypatch):
    """Stands in for a node whose tasks each see one GPU as number 0, as Slurm's cgroups show it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert choose_device(RankInfo(launcher, local_rank, 4, local_rank, 4)) == torch.device(device)


def test_world_of_another_size_than_the_launchers_is_closed_and_refused():
    backend = Single()
    refuse_split_world(backend, None)
    refuse_split_world(backend, RankInfo("srun", 0, 1))
    assert not backend.closed
    message = r"mpirun \(MPICH\) started 2 workers, but this one is in a world of 1 over single. Check that the library"
    with pytest.raises(BackendError, match=message):
        refuse_split_world(backend, RankInfo("mpirun (MPICH)", 0, 2))
    assert backend.closed


def _run_local_ranks() -> tuple[int, int, int]:
    backend = current()
    return backend.rank, backend.local_rank, backend.node_rank


def test_local_rank_is_found_from_the_others_where_the_launcher_does_not_say():
    # mpirun says nothing of the nodes; plain processes have LOCAL_RANK alone.
    for kind in ("mpi", "torch_dist"):
        assert workers.world(kind, 2).run(_run_local_ranks) == [(0, 0, 0), (1, 1, 0)]


def _run_counted() -> tuple[int, int, bool]:
    backend = current()
    assert isinstance(backend, World)
    before_bytes, before_s = backend.all_reduce_bytes, backend.all_reduce_s
    backend.all_reduce(torch.zeros(100)).wait()
    backend.broadcast(torch.zeros(100)).wait()
    return backend.all_reduce_bytes - before_bytes, backend.num_pending, backend.all_reduce_s > before_s


def test_sums_over_ranks_are_counted_and_none_stays_pending():
    assert workers.world("torch_dist", 2).run(_run_counted) == [(400, 0, True)] * 2


def _run_leaves_a_collective_open() -> None:
    backend = init("torch_dist")
    backend.barrier()
    if backend.rank == 0:
        backend.all_reduce(torch.zeros(1))  # its rank 1 never calls it
    else:
        backend.stop_heartbeat()
    print("left")


def test_process_with_an_unfinished_collective_ends_at_once_and_not_well():
    statuses, started = workers.run_script("torch_dist", 2, _run_leaves_a_collective_open, timeout_s=60)
    assert statuses == [1, 0], started.output()


def test_error_of_a_lone_process_is_shown_once():
    code = "import distopt; distopt.init('single'); raise ValueError('a bad row')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("ValueError: a bad row")) == (1, 1)

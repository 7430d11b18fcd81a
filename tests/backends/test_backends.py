"""Which backend a process gets, and what it is told when it cannot have one."""

from __future__ import annotations

import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from distopt import backends
from distopt.backends import Backend, BackendError, current, init
from distopt.backends.environment import STARTERS, Place, find_place, find_rendezvous
from distopt.backends.single import Single
from distopt.backends.torch_dist import TorchDist
from tests.workers import free_port

ENVIRONMENTS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    | {"GROUP_RANK": "1"},
    "horovodrun": {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
    | {"HOROVOD_CROSS_RANK": "1"},
    "mpirun (Open MPI)": {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    "mpirun (MPICH)": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"},
    "srun": {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"},
    "Kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    "the environment": {"MASTER_ADDR": "h", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that nobody has started, with no backend yet."""
    for variables in ENVIRONMENTS.values():
        for variable in (*variables, "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "_current", None)


@pytest.mark.parametrize("starter", ENVIRONMENTS)
def test_each_launcher_is_recognised_by_its_variables(starter: str) -> None:
    place = find_place(ENVIRONMENTS[starter])
    assert place is not None
    assert (place.starter, place.rank, place.world_size, place.local_rank) == (starter, 3, 4, 1)


def test_every_launcher_of_the_table_has_an_example() -> None:
    assert {starter.name for starter in STARTERS} == set(ENVIRONMENTS)


def test_batch_script_of_slurm_is_a_lone_process() -> None:
    assert find_place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}) is None


def test_torchrun_inside_srun_is_torchrun() -> None:
    place = find_place(ENVIRONMENTS["srun"] | ENVIRONMENTS["torchrun"])
    assert place is not None and place.starter == "torchrun"


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "4"}])
def test_variables_that_make_no_sense_are_an_error_that_shows_them(change: dict[str, str]) -> None:
    with pytest.raises(BackendError, match="RANK='[x4]'"):
        find_place(ENVIRONMENTS["torchrun"] | change)


def test_srun_meets_at_the_first_node_of_the_step() -> None:
    place = Place("srun", 1, 4)
    variables = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "dn[3-5],gpu1"}
    assert find_rendezvous(place, variables) == ("dn3", 15000 + 7 * 16 + 2)
    assert find_rendezvous(place, variables | {"MASTER_ADDR": "h", "MASTER_PORT": "9"}) == ("h", 9)


def test_lone_process_gets_a_world_of_one() -> None:
    backend = init()
    assert isinstance(backend, Single) and isinstance(backend, Backend)
    assert init() is backend is current()
    with pytest.raises(BackendError, match="already uses single"):
        init("torch_dist")
    backend.close()
    assert init() is not backend


def test_init_that_was_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in ENVIRONMENTS["torchrun"].items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=r"started by torchrun as rank 3 of 4, but distopt.init\(\) was never"):
        current()


def test_process_group_of_the_script_is_adopted_and_left_alone() -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        backend = current()
        assert isinstance(backend, TorchDist) and backend.world_size == 1
        backend.close()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_world_of_another_size_is_refused() -> None:
    with pytest.raises(BackendError, match="4 workers were asked for, this world has 1"):
        init(world_size=4)


def test_rank_that_never_comes_is_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=rf"not all ranks met at 127.0.0.1:{port} within 1 s.*2 processes were"):
        init("torch_dist", timeout=timedelta(seconds=1))


def test_wrong_address_is_an_error_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match="Check that MASTER_ADDR is the host of rank 0"):
        init("torch_dist", timeout=timedelta(seconds=1))


def test_address_that_is_missing_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in ENVIRONMENTS["mpirun (Open MPI)"].items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match="MASTER_ADDR and MASTER_PORT not set"):
        init("torch_dist")


LIBRARIES = [("horovod", "horovod", "make setup-dev"), ("mpi", "mpi4py", "distopt")]


@pytest.mark.parametrize(("name", "module", "mend"), LIBRARIES)
def test_missing_library_names_the_mending_command(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, mend: str
) -> None:
    for loaded in [each for each in sys.modules if each.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=mend):
        init(name)


def test_unknown_backend_is_answered_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match="backend='gloo': unknown. Known: auto, single, torch_dist, horovod, mpi"):
        init("gloo")

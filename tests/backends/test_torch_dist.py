"""torch.distributed: how its ranks meet, and a process group that is the script's."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distopt.backends import BackendError, current, init
from distopt.backends.torch_dist import TorchDist
from tests.test_launchers import exported, open_mpi
from tests.workers import free_port, run_script, world


@pytest.fixture
def group():
    """A process group that the script has made, of this process alone."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_process_group_of_the_script_is_adopted_and_left_alone(group):
    backend = current()
    assert isinstance(backend, TorchDist) and backend.world_size == 1
    assert backend.control_device == torch.device("cpu")
    backend.close()
    assert dist.is_initialized()


class DerivedTorchDist(TorchDist):
    """A backend of the user's that is based on the shipped one."""

    name = "derived"


@pytest.mark.parametrize("name", ["auto", "torch_dist", f"{__name__}:DerivedTorchDist"])
def test_process_group_of_the_script_is_adopted_by_whatever_name_init_is_given(group, name):
    backend = init(name)
    assert isinstance(backend, TorchDist) and backend.world_size == 1
    assert backend.name == ("derived" if ":" in name else "torch_dist")
    backend.close()
    assert dist.is_initialized()


def test_process_group_that_init_made_ends_with_the_backend(started_as):
    started_as(exported(0, 1) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    backend = init()
    assert isinstance(backend, TorchDist) and dist.is_initialized()
    backend.close()
    assert not dist.is_initialized()
    with pytest.raises(BackendError, match="rank 0 of 1: torch_dist all_reduce: this backend was closed"):
        backend.all_reduce(torch.zeros(1))


def test_rank_that_never_comes_is_an_error_with_the_address(started_as):
    port = str(free_port())
    started_as(exported(0, 2) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    with pytest.raises(BackendError, match=rf"not all ranks met at 127.0.0.1:{port} within 1 s.*2 processes were"):
        init("torch_dist", timeout=timedelta(seconds=1))


def test_wrong_address_is_an_error_with_the_address(started_as):
    started_as(exported(1, 2) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    with pytest.raises(BackendError, match="Check that MASTER_ADDR is the host of rank 0"):
        init("torch_dist", timeout=timedelta(seconds=1))


def test_address_that_is_missing_names_the_variables(started_as):
    started_as(open_mpi(3, 4))
    with pytest.raises(BackendError, match="MASTER_ADDR and MASTER_PORT not set"):
        init("torch_dist")


def test_launcher_that_is_missing_names_the_variables():
    with pytest.raises(BackendError, match="set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"):
        init("torch_dist")


def _run_policies():
    names = {task.name: (task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    of_gloo = [int(number) for number, name in names.items() if "gloo" in name]
    return [os.sched_getscheduler(number) for number in of_gloo], os.sched_getscheduler(0)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has the policy")
def test_threads_of_gloo_do_not_interrupt_the_thread_that_wakes_them():
    try:
        os.sched_setscheduler(0, os.sched_getscheduler(0), os.sched_param(0))
    except OSError:
        pytest.skip("this sandbox lets no process choose a policy")
    for policies, mine in world("torch_dist", 2).run(_run_policies):
        assert set(policies) == {os.SCHED_BATCH} and mine == os.SCHED_OTHER


def test_process_that_is_alone_leaves_its_group_at_its_end():
    statuses, started = run_script("torch_dist", 1, _run_ends)
    assert (statuses, started.output().split()) == ([0], ["left"])


def _run_ends() -> None:
    atexit.register(lambda: print("open" if dist.is_initialized() else "left"))  # runs after what init registers
    init("torch_dist").all_reduce(torch.ones(3)).wait()

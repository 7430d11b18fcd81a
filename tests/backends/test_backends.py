"""Which backend a process gets, and what it is told when it cannot have one."""

from __future__ import annotations

import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from distopt import backends
from distopt.backends import Backend, BackendError, current, init
from distopt.backends.single import Single
from distopt.backends.torch_dist import TorchDist
from tests.test_launchers import ENVIRONMENTS, open_mpi, torchrun
from tests.workers import free_port


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that nobody has started, with no backend yet."""
    for variables in ENVIRONMENTS.values():
        for variable in variables(0, 1):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backends, "_current", None)


def test_lone_process_gets_a_world_of_one() -> None:
    backend = init()
    assert isinstance(backend, Single) and isinstance(backend, Backend)
    assert init() is backend is current()
    with pytest.raises(BackendError, match="already uses single"):
        init("torch_dist")
    backend.close()
    assert init() is not backend


def test_init_that_was_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in torchrun(3, 4).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(BackendError, match=r"started by torchrun as rank 3 of 4, but distopt.init\(\) was never"):
        current()


def test_rank_that_makes_no_sense_is_an_error_of_init(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in torchrun(4, 4).items():
        monkeypatch.setenv(variable, value)
    for start in (init, current):
        with pytest.raises(BackendError, match="torchrun says RANK='4' of WORLD_SIZE='4'"):
            start()


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
    for variable, value in open_mpi(3, 4).items():
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
